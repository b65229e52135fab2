"""
report.html:

one page with everything that report.json holds, which loads nothing. The second half asks a real browser.
"""

import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest
from conftest import PATIENCE
from PIL import Image
from reports import ODD, SLOTS, moved, report, stage

from hft_trl.report import Report
from hft_trl.report.movement import movement_grids
from hft_trl.report.sections import launch_command, sections
from hft_trl.report.tables import evaluation_grids, sample_grid, share_grid, stage_grid
from hft_trl.report.views import report_markdown, report_page, verdict

ROOT = Path(__file__).parents[2]
HOSTILE = "<script>document.title='broken in'</script><img src=x onerror=\"document.title='broken in'\">&'\""
LONG = "a-very-long-name-" * 12
SCORES = {f"task_{number}": 50.0 + number for number in range(9)}
PAGES = {
    **ODD,
    "suites": report(
        evaluation={"base": SCORES, "sft": SCORES, "dpo": SCORES},
        standard_errors={name: dict.fromkeys(SCORES, 1.25) for name in ("base", "sft", "dpo")},
        suites={"general": list(SCORES)[:7], "knowledge": list(SCORES)[7:]},
    ),
    "deep with experts": report(
        stage(moved=moved(80, {**SLOTS, **{f"mlp.experts.{n}.up_proj": "feed_forward" for n in range(128)}}))
    ),
    "long names": report(
        stage(dataset=f"/{LONG}", start_model=LONG), base_model=LONG, command=["run.py", LONG], settings={LONG: LONG * 9},
        environment={"device": LONG},
    ),
    "everything": report(environment={"torch": "2.13.0", "python": "3.11"}, settings={"sft": {"learning_rate": 1e-3}}),
}  # fmt: skip


@cache
def html_of(name):
    """One of the pages, made once."""
    return report_page(PAGES[name])


VOID = {"meta", "link", "img", "br"}


class Page(HTMLParser):
    """
    What a page holds.

    Its tags with attributes, its tables as texts, and its text. Tags have to close as they open.
    """

    def __init__(self, html: str):
        super().__init__()
        self.tags, self.tables, self.words, self.open = [], [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if "td" in self.open or "th" in self.open:
            self.tables[-1][-1][-1] += text.replace("\u00a0%", " %")  # a number and its unit stay together
        self.words.append(text)

    def all(self, *names):
        return [(tag, attributes) for tag, attributes in self.tags if tag in names]

    def values(self, name):
        return [attributes[name] for _, attributes in self.tags if name in attributes]

    @property
    def text(self):
        return " ".join("".join(self.words).split())


@pytest.mark.parametrize("name", PAGES)
def test_page_holds_every_table_of_the_report(name):
    """The tables of the terminal and of Markdown, cell by cell."""
    whole, page = PAGES[name], Page(html_of(name))
    grids = [stage_grid(whole), share_grid(whole), *evaluation_grids(whole), *movement_grids(whole)]
    grids += [sample_grid(whole)] if whole.samples else []
    for grid in grids:
        assert [grid.columns, *grid.rows] in page.tables
        assert " ".join(grid.title.split()) in page.text or grid.title == "Stages"
    for record in whole.stages:
        assert record.dataset in page.text
        assert record.selection_digest is None or record.selection_digest in page.text
    for name, value in whole.environment.items():
        assert [name, value] in [row for table in page.tables for row in table]


@pytest.mark.parametrize("name", PAGES)
def test_page_refers_to_nothing_outside_of_itself(name):
    """Links lead into the page, pictures are inside of it, no style or drawing names an address, nothing runs."""
    html = html_of(name)
    page = Page(html)
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    for target in page.values("href"):
        assert target == "data:," or target.removeprefix("#") in ids
    allowed = (
        "html head meta title link style body header main footer nav section h1 h2 h3 p ul li a strong code pre span"
    )
    allowed += " abbr details summary div figure figcaption img table thead tbody tr th td"
    assert {tag for tag, _ in page.tags} <= set(allowed.split())
    assert not [key for _, attributes in page.tags for key in attributes if key.startswith("on")]
    assert not re.search(r"url\(|@import", html)
    head = "data:image/svg+xml;base64,"
    for source in page.values("src"):
        assert source.startswith(head)
        drawing = ElementTree.fromstring(base64.b64decode(source.removeprefix(head), validate=True))
        for element in drawing.iter():
            assert not element.tag.endswith(("}script", "}foreignObject"))
            targets = [value for key, value in element.attrib.items() if key.endswith("href")]
            assert all(target.startswith(("#", "data:image/png;base64,")) for target in targets)
    policy = next(attributes for tag, attributes in page.all("meta") if "http-equiv" in attributes)
    assert policy["content"].startswith("default-src 'none'; ")


@pytest.mark.parametrize("name", PAGES)
def test_headings_make_an_outline_and_pictures_have_texts(name):
    """One title, no level skipped, every section in the contents, an alternative text and a size for every picture."""
    page = Page(html_of(name))
    levels = [int(tag[1]) for tag, _ in page.all("h1", "h2", "h3")]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    assert [target for target in page.values("href") if target.startswith("#")] == [
        f"#{attributes['id']}" for _, attributes in page.all("section")
    ]
    for _, attributes in page.all("img"):
        assert len(attributes["alt"]) > 20
        assert int(attributes["width"]) > 300
        assert int(attributes["height"]) > 200


def test_both_views_have_the_sections_of_the_list():
    """In their order."""
    whole = PAGES["everything"]
    titles = [section.title for section in sections(whole)]
    assert re.findall(r"<h2>(.*)</h2>", html_of("everything")) == titles
    text = report_markdown(whole, ["loss.png", "margins.png", "moved.png", "evaluation.png"])
    assert re.findall(r"(?m)^## (.*)$", text) == titles


def test_same_report_gives_the_same_bytes(tmp_path):
    """Also in another process: two pages differ only if their reports do."""
    PAGES["everything"].save(tmp_path)
    code = (
        "import sys; from hft_trl.report import Report; from hft_trl.report.views import report_page\n"
        "sys.stdout.buffer.write(report_page(Report.load(sys.argv[1])).encode())"
    )
    other = subprocess.run([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, check=True).stdout
    assert other == report_page(Report.load(tmp_path)).encode()


@pytest.mark.parametrize(("name", "kilobytes"), [("deep with experts", 700), ("eight rounds", 2000), ("no stage", 20)])
def test_page_stays_small(name, kilobytes):
    """A page is sent by mail: 80 layers, 128 experts or eight rounds don't make it large."""
    assert len(html_of(name).encode()) < 1000 * kilobytes


def hostile():
    record = stage(dataset=HOSTILE, start_model=HOSTILE)
    record.moved[0].slot = record.moved[-1].name = HOSTILE
    return report(
        record,
        base_model=HOSTILE,
        command=["run.py", HOSTILE],
        settings={HOSTILE: [HOSTILE]},
        environment={HOSTILE: HOSTILE},
        evaluation={"base": {HOSTILE: 1.0}, HOSTILE: {HOSTILE: 2.0}},
        suites={HOSTILE: [HOSTILE]},
    )


@pytest.mark.filterwarnings("ignore:constrained_layout not applied")
def test_what_users_typed_stays_text():
    """A data set called <script>, and the same for models, commands, settings, measures and matrices."""
    page = Page(report_page(hostile()))
    assert not page.all("script")
    assert all(source.startswith("data:") for source in page.values("src"))
    text = " ".join(HOSTILE.split())
    assert page.text.count(text) >= 10
    assert [HOSTILE, HOSTILE] in page.tables[-1]


@pytest.mark.parametrize(
    ("found", "state"),
    [((True, True), "good"), ((True, None), "good"), ((True, False), "bad"), ((None, None), "none")],
)
def test_verdict_on_the_frozen_half_stands_on_top(found, state):
    """
    One stage that changed a frozen weight is said, whatever the others did; without a frozen half nothing is claimed.
    """
    whole = report(*(stage(name, frozen_unchanged=kept) for name, kept in zip(("sft", "dpo"), found, strict=True)))
    assert verdict(whole)[0] == state
    assert verdict(whole)[1] in Page(report_page(whole)).text


def test_command_can_be_typed_again():
    """A recipe is named with its launcher; spaces and quotes survive the shell."""
    whole = report(command=["recipes/sft.py", "--dataset", "my 'own' data.jsonl"])
    command = launch_command(whole)
    assert command.startswith("accelerate launch recipes/sft.py --dataset ")
    words = subprocess.run(["sh", "-c", f"printf '%s\\n' {command}"], capture_output=True, text=True, check=True)
    assert words.stdout.splitlines() == ["accelerate", "launch", *whole.command]
    assert command in Page(report_page(whole)).text


@pytest.mark.parametrize(("number", "said"), [(1, "It ran in 1 process."), (4, "It ran in 4 processes.")])
def test_number_of_processes_stands_beside_the_command(number, said):
    """The launcher's own flags are not in the command, so that it may start another number of processes."""
    whole = report(command=["recipes/sft.py"], num_processes=number)
    text, page = report_markdown(whole, []), Page(report_page(whole)).text
    for view in (text, page):
        assert f"{said} Flags of accelerate launch itself, such as --config_file" in view


def test_files_that_the_package_reads_are_shipped():
    """Every file beside the modules matches a pattern of pyproject.toml's package data: the template, tasks, demo."""
    project = (ROOT / "pyproject.toml").read_text()
    patterns = json.loads(re.search(r"package-data\]\nhft_trl = (\[.*\])", project)[1])
    package = ROOT / "hft_trl"
    shipped = {path for pattern in patterns for path in package.glob(pattern)}
    others = {path for path in package.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert package / "report" / "page.html.jinja" in others
    assert others <= shipped


# In a browser


def missing(what):
    """Skip where a browser cannot be expected; fail where the machine was set up for one."""
    if os.environ.get("HFT_TRL_BROWSER") == "required":
        pytest.fail(f"HFT_TRL_BROWSER=required, but {what}")
    pytest.skip(what)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    program = next(filter(None, map(shutil.which, names)), None)
    driver = shutil.which("chromedriver")
    if program is None or driver is None:
        missing(
            f"no browser: none of {', '.join(names)} with chromedriver is on PATH (apt-get install chromium-driver)"
        )
    try:
        from selenium import webdriver
    except ImportError:
        missing("selenium is not installed (the extra `test` has it)")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    for flag in (
        # The sandbox refuses root, and containers' /dev/shm is too small.
        *("headless", "no-sandbox", "disable-dev-shm-usage", "disable-gpu", "no-first-run", "disable-sync"),
        *("disable-background-networking", "disable-component-update", "host-resolver-rules=MAP * ~NOTFOUND"),
        f"user-data-dir={tmp_path_factory.mktemp('browser')}",
    ):
        options.add_argument(f"--{flag}")
    found = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    found.set_page_load_timeout(PATIENCE)
    yield found
    found.quit()


@pytest.fixture(scope="module")
def opened(browser, tmp_path_factory):
    """Opens a page's file at a width and in a colour scheme, and says what the console and the network had to say."""
    folder = tmp_path_factory.mktemp("pages")
    written = {}

    def open_page(html, width=1280, scheme="light"):
        path = written.setdefault(html, folder / f"{len(written)}.html")
        path.write_text(html, encoding="utf-8")
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        feature = {"name": "prefers-color-scheme", "value": scheme}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        for log in ("browser", "performance"):
            browser.get_log(log)
        browser.get(path.as_uri())
        events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
        requests = [
            event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"
        ]
        failed = [event["params"] for event in events if event["method"] == "Network.loadingFailed"]
        foreign = [url for url in requests if not url.startswith("data:") and url != path.as_uri()]
        assert path.as_uri() in requests
        return browser.get_log("browser"), failed, foreign

    return open_page


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("name", PAGES)
def test_page_renders_in_a_browser(browser, opened, name, width):
    """
    Nothing in the console, no request beyond the file, headings and pictures there, no scrolling sideways, letters to
    read.
    """
    assert opened(html_of(name), width) == ([], [], [])
    seen = browser.execute_script(
        """
        const box = element => element.getBoundingClientRect();
        const texts = [...document.querySelectorAll('body *')].filter(element =>
            [...element.childNodes].some(node => node.nodeType === 3 && node.textContent.trim()));
        return {
            mode: document.compatMode, page: document.documentElement.scrollWidth, window: document.documentElement.clientWidth,
            headings: [...document.querySelectorAll('h1, h2, h3')].map(e => [e.textContent, box(e).width, box(e).height]),
            images: [...document.images].map(e => [e.complete, e.naturalWidth, e.naturalHeight, box(e).width / e.naturalWidth]),
            letters: texts.map(e => parseFloat(getComputedStyle(e).fontSize)),
            outside: texts.filter(e => !e.closest('.scroll, pre') && box(e).right > innerWidth + 1).map(e => e.textContent),
        }
        """
    )
    assert seen["mode"] == "CSS1Compat"
    assert seen["page"] <= seen["window"] <= width
    assert seen["outside"] == []
    assert seen["headings"][0][0] == "Fine-tuning report"
    assert all(wide > 30 and high > 10 for _, wide, high in seen["headings"])
    assert len(seen["images"]) == html_of(name).count("<img ")
    for complete, wide, high, scale in seen["images"]:
        assert complete
        assert min(wide, high) > 200
        assert scale >= 0.79  # matplotlib's letters of 10 points are then nearly 11 pixels high
    assert min(seen["letters"]) >= 12


def test_wide_tables_scroll_in_their_own_box(browser, opened):
    """
    Seven scores with errors are wider than a phone.

    The last of them can be brought into view, and the page stays put.
    """
    opened(html_of("suites"), 360)
    before, after, page = browser.execute_script(
        """
        const table = document.querySelector('#retention .scroll'), last = table.querySelector('tr > :last-child');
        const before = last.getBoundingClientRect().right;
        table.scrollLeft = 1e6;
        return [before, last.getBoundingClientRect().right, scrollX];
        """
    )
    assert before > 360
    assert 0 < after <= 360
    assert page == 0


def test_a_table_that_is_cut_has_a_shadow_at_its_edge(browser, opened):
    """It disappears once the last column is in view, and a table that fits has none."""
    opened(html_of("suites"), 360)

    def edge(selector, scrolled):
        script = "const e = document.querySelector(arguments[0]); e.scrollLeft = arguments[1]; e.scrollIntoView();"
        browser.execute_script(script + "scrollTo(0, scrollY)", selector, scrolled)
        script = "const b = document.querySelector(arguments[0]).getBoundingClientRect(); return [b.right, b.top]"
        right, top = browser.execute_script(script, selector)
        picture = Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("L")
        return picture.getpixel((int(right) - 1, int(top) + 14))

    assert edge("#retention .cut", 0) < 220
    assert edge("#retention .cut", 1e6) > 250
    opened(html_of("suites"), 1280)
    assert edge("#retention .cut", 0) > 250


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_stand_out_from_their_ground(browser, opened, scheme):
    """WCAG's contrast of 4.5 to 1 for every text in either colour scheme; dark means a dark page."""
    opened(html_of("everything"), scheme=scheme)
    ground, contrasts = browser.execute_script(
        """
        const light = colour => colour.match(/[\\d.]+/g).slice(0, 3).map(Number).map(v => v / 255)
            .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
            .reduce((sum, v, place) => sum + v * [0.2126, 0.7152, 0.0722][place], 0);
        const ground = element => {
            const own = getComputedStyle(element).backgroundColor;
            return own === 'rgba(0, 0, 0, 0)' ? ground(element.parentElement) : own;
        };
        const texts = [...document.querySelectorAll('h1, h2, h3, p, a, li, th, td, code, figcaption')];
        return [light(ground(document.body)), texts.map(element => {
            const [a, b] = [light(getComputedStyle(element).color), light(ground(element))];
            return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        })];
        """
    )
    assert (ground > 0.9) == (scheme == "light")
    assert (ground < 0.05) == (scheme == "dark")
    assert len(contrasts) > 50
    assert min(contrasts) >= 4.5


@pytest.mark.filterwarnings("ignore:constrained_layout not applied")
def test_browser_runs_nothing_that_users_typed(browser, opened):
    """The page of a hostile report shows it as text, and the title is the page's own."""
    assert opened(report_page(hostile())) == ([], [], [])
    assert browser.title == f"Fine-tuning report: {' '.join(HOSTILE.split())}"
    assert browser.execute_script("return document.scripts.length") == 0


def test_policy_of_the_page_forbids_network_and_scripts(browser, opened):
    """Even a page that was tampered with loads and runs nothing, and the checks above would see it try."""
    planted = "<script>document.title = 'broken in'</script><img src='http://example.com/x.png'></body>"
    tampered = html_of("everything").replace("</body>", planted)
    console, failed, _ = opened(tampered)
    messages = " ".join(entry["message"] for entry in console)
    assert "script" in messages
    assert "example.com" in messages
    assert any(event.get("blockedReason") == "csp" for event in failed)
    assert browser.title.startswith("Fine-tuning report")


def test_page_prints(browser, opened):
    """On paper no setting is folded, or cut off by a box that scrolls."""
    opened(html_of("everything"))
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    boxes = browser.execute_script(
        "return [...document.querySelectorAll('pre')].map(box => [box.scrollHeight, box.clientHeight])"
    )
    assert all(height > 0 for _, height in boxes)
    assert len(boxes) == html_of("everything").count("<pre")
    assert all(inner <= outer for inner, outer in boxes)
    printed = browser.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})
    assert base64.b64decode(printed["data"]).startswith(b"%PDF")
