"""What a user sees of an evaluation: its tables on the terminal, `evaluation.json`, `evaluation.md` and `evaluation.png`."""

from pathlib import Path

from rich.console import Console

from hft_trl.errors import HFTError
from hft_trl.evaluation.plot import score_figure
from hft_trl.evaluation.scores import Evaluation, Score
from hft_trl.files import write_json, write_text
from hft_trl.report.figures import save_figure
from hft_trl.report.tables import NONE, Grid, narrowed, rich_table, table

EVALUATION_FILE = "evaluation.json"
ERROR_OF_AVERAGE = (
    "The standard errors are the harness's, over the items of a task. That of an average is the root of the sum of its "
    "scores' squared errors, divided by their number: the tasks are fixed, and their items independent."
)


def score_grids(evaluation: Evaluation) -> list[Grid]:
    """
    The table of each suite.

    Args:
        evaluation ([`Evaluation`]):
            The evaluation.

    Returns:
        `list[Grid]`: A row a model, a column a heading, then the average.
    """
    base = evaluation.base
    against = f", in brackets the difference to {base}" if len(evaluation.models) > 1 else ""
    limit = "" if evaluation.limit is None else f", at most {evaluation.limit} of each task's items"
    grids = []
    for suite in evaluation.scores:
        first = evaluation.columns(suite, base)
        rows = [
            [
                model,
                *(
                    _cell(score, evaluation.difference(suite, model, heading))
                    for heading, score in evaluation.columns(suite, model).items()
                ),
            ]
            for model in evaluation.models
        ]
        columns = ["model", *(heading.replace("_", " ") for heading in first)]
        grids.append(Grid(f"{suite} (percent ± standard error{against}{limit})", columns, rows))
    return grids


def _cell(score: Score, difference: float | None) -> str:
    if score.value is None:
        return NONE
    error = "" if score.stderr is None else f"±{score.stderr:.1f}"
    against = "" if difference is None else f" ({difference:+.1f})"
    return f"{score.value:.1f}{error}{against}"


def notes(evaluation: Evaluation) -> list[str]:
    """What a reader of the tables has to know beside them, a sentence each."""
    found = []
    if evaluation.skipped:
        found.append(
            f"{', '.join(evaluation.skipped)} was skipped, and is not in the average: it runs code that the model wrote, "
            "which --run-code allows."
        )
    return found


def write_evaluation(evaluation: Evaluation, directory: str | Path) -> list[Path]:
    """
    Write `evaluation.json`, `evaluation.md` and `evaluation.png`.

    Args:
        evaluation ([`Evaluation`]):
            The evaluation.
        directory (`str` or `Path`):
            Folder to write to, made if it is missing.

    Returns:
        `list[Path]`: The files written.

    Raises:
        [`HFTError`]: If the folder can't be written.
    """
    folder = Path(directory)
    data, text, picture = (folder / name for name in (EVALUATION_FILE, "evaluation.md", "evaluation.png"))
    parts = ["# Evaluation"]
    for grid in score_grids(evaluation):
        suite, _, form = grid.title.partition(" ")
        form = form.strip("()")
        parts += [f"## {suite}", f"{form[0].upper()}{form[1:]}.", table(grid)]
    parts += [*notes(evaluation), ERROR_OF_AVERAGE]
    parts += [f"![scores]({picture.name})", f"Every figure comes from `{data.name}`, {evaluation.created}."]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(data, evaluation.to_dict(), allow_nan=False)
        write_text(text, "\n\n".join(parts) + "\n")
        save_figure(score_figure(evaluation), picture)
    except OSError as error:
        raise HFTError(f"{folder} can't be written ({error.strerror}): choose another output folder.") from error
    return [data, text, picture]


def print_evaluation(evaluation: Evaluation) -> None:
    """
    Print the tables of an evaluation on standard output.

    Args:
        evaluation ([`Evaluation`]):
            The evaluation.
    """
    console = Console(highlight=False)
    for grid in score_grids(evaluation):
        console.print(rich_table(narrowed(grid)))
    for note in notes(evaluation):
        console.print(note, markup=False)
