"""The end of a recipe: its models evaluated, and all that was measured written and printed."""

import sys
from collections.abc import Sequence

from accelerate import PartialState

from hft_trl.evaluation import parse_suites
from hft_trl.recipe.arguments import RunArguments
from hft_trl.recipe.evaluation import evaluate_stages
from hft_trl.recipe.folder import finished, settings
from hft_trl.recipe.stage import Stage
from hft_trl.report import Report, environment, print_report, write_views


def report(stages: Sequence[Stage], run: RunArguments | None = None) -> None:
    """
    Write `report.json`, `report.md`, `report.html` and the pictures of finished stages, and print the tables.

    Args:
        stages (`Sequence[Stage]`):
            The finished stages in order. Every process has to call.
        run ([`~hft_trl.recipe.arguments.RunArguments`], *optional*):
            The run that they belong to: its folder gets the report, and its suites are run on the base and every stage's model.
            Without it the report is that of the only stage, in the stage's folder.
    """
    start = stages[0].model
    folder, scores, errors, shown = str(stages[0].folder), {}, {}, {}
    if run is not None:
        models = {stage.name: str(stage.folder) for stage in stages}
        suites = parse_suites(run.evaluate) if run.evaluate else []
        folder, (scores, errors, shown) = run.output_dir, evaluate_stages(start, models, suites)
    if not PartialState().is_main_process:
        return
    Report(
        stages=[finished(stage) for stage in stages],
        evaluation=scores,
        standard_errors=errors,
        suites=shown,
        base_model=start.model_name_or_path,
        command=sys.argv,
        settings=settings(stages[0]) if run is None else {stage.name: settings(stage) for stage in stages},
        num_processes=PartialState().num_processes,
        environment=environment(),
    ).save(folder)
    read = Report.load(folder)  # every view shows what the file says
    write_views(read, folder)
    print_report(read)
