"""
What models know and can do, in lm-evaluation-harness, side by side with the base that they were trained from.

```bash
accelerate launch recipes/evaluate.py runs/sft_then_dpo/sft runs/sft_then_dpo/dpo --base demo --suite demo
accelerate launch recipes/evaluate.py runs/hft runs/fft --base meta-llama/Llama-2-7b-hf --suite general,knowledge --dtype bfloat16
```

Every process takes a share of the items. `hft-trl evaluate` has the same flags, for one process. What was measured once
comes from the cache, so a further model or suite costs only itself.
"""

from pathlib import Path

import typer
from accelerate import PartialState
from hft_trl import exit_on_user_error
from hft_trl.evaluation import options, parse_suites, print_evaluation, write_evaluation
from hft_trl.evaluation.models import find_models
from hft_trl.evaluation.run import evaluate_models


def main(
    models: options.Models,
    suite: options.Suite = "demo",
    base: options.Base = None,
    output: options.Output = Path("runs/evaluation"),
    limit: options.Limit = None,
    batch_size: options.BatchSize = 16,
    dtype: options.Dtype = "auto",
    chat_template: options.ChatTemplate = None,
    run_code: options.RunCode = False,
    cache: options.Cache = None,
) -> None:
    # Whatever can be wrong is found before anything is asked
    suites = parse_suites(suite)
    folders = find_models(models, base)

    # Each model is asked what the cache doesn't know of it yet
    evaluation = evaluate_models(
        folders,
        suites,
        chat_template=chat_template,
        dtype=dtype,
        batch_size=batch_size,
        limit=limit,
        run_code=run_code,
        cache=cache,
    )

    # One table: on the terminal, as JSON, as Markdown and as a bar chart
    if PartialState().is_main_process:
        write_evaluation(evaluation, output)
        print_evaluation(evaluation)


if __name__ == "__main__":
    with exit_on_user_error():
        typer.run(main)
