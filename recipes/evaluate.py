r"""
Evaluate models in lm-evaluation-harness, side by side with the base that they were trained from.

```bash
accelerate launch recipes/evaluate.py runs/sft_then_dpo/sft runs/sft_then_dpo/dpo --base demo --suite demo
accelerate launch recipes/evaluate.py runs/hft runs/fft --base meta-llama/Llama-2-7b-hf --suite general,knowledge \
    --dtype bfloat16
```

This is `hft-trl evaluate`, launched in several processes, each of which takes a share of the items. The cache holds
every finished task, so a further model or suite costs only itself. To call the evaluation from your own script, see
"From Python" in docs/evaluation.md.
"""

import typer
from hft_trl.cli.evaluate import evaluate_command

if __name__ == "__main__":
    typer.run(evaluate_command)
