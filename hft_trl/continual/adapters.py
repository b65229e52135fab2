"""LoRA adapters round after round: one that goes on (LoRASeqFT), or a new one that keeps out of the earlier ones' way (O-LoRA)."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import load_peft_weights
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments, set_seed
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import SFTConfig, SFTTrainer

from hft_trl.backends.fsdp import fsdp_version
from hft_trl.checkpoints.preemption import StopAtStepEnd
from hft_trl.checkpoints.resumable import ResumableMixin
from hft_trl.errors import HFTError, as_user_error
from hft_trl.files import read_object, write_json
from hft_trl.recipe import Stage
from hft_trl.recipe.arguments import ADAPTER_FOLDER, Adapter, LoRAArguments
from hft_trl.skeleton import build_on_meta
from hft_trl.weights import combined_digest, fingerprints

START_FILE = "hft_start.json"
"""In a checkpoint: name and digest of what the adapter was started on."""


class AdapterTrainer(ResumableMixin, SFTTrainer):
    """
    [`~trl.SFTTrainer`] of a LoRA adapter on a frozen model. Checkpoints hold the adapter; what training ends with is the
    whole model, the adapter merged into it, with the adapter alone in `adapter/` beside.

    Args:
        model (`str`):
            Folder or hub id of the model that the adapter is for.
        args ([`~trl.SFTConfig`]):
            The trainer's arguments.
        adapter ([`~hft_trl.recipe.Adapter`]):
            Which adapter.
        **kwargs (`Any`):
            Of the parent.

    Raises:
        [`HFTError`]: If the model would be sharded.
    """

    def __init__(self, model: str, args: SFTConfig, adapter: Adapter, **kwargs: Any) -> None:
        _refuse_shards(args)
        super().__init__(model=model, args=args, peft_config=lora_config(adapter.lora), **kwargs)
        if adapter.start is not None:
            self._load_from_checkpoint(str(adapter.start / ADAPTER_FOLDER))
        # A new adapter is drawn, which other machines may do in other bits; everything else is given.
        given = ((name, p) for name, p in self.model.named_parameters() if adapter.start or not p.requires_grad)
        self._start = {"name_or_path": model, "weights_digest": combined_digest(fingerprints(given))}
        self._preemption = StopAtStepEnd.install(self)

    def _check_same_training(self, checkpoint: str) -> None:
        path = Path(checkpoint) / START_FILE
        try:
            there = read_object(path, weights_digest=str) if path.exists() else {"weights_digest": "unknown"}
        except (OSError, ValueError) as error:
            raise HFTError(
                f"{path} can't be read ({error}): remove {checkpoint}, and run the same command again."
            ) from error
        if there["weights_digest"] != self._start["weights_digest"]:
            raise HFTError(
                f"{checkpoint} was started from other weights (digest {there['weights_digest'][:16]}) than "
                f"{self._start['name_or_path']!r} has now ({self._start['weights_digest'][:16]}): put those back, or train "
                "into another output_dir."
            )

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """Save a checkpoint as the parent does; elsewhere the whole model, its tokenizer and the adapter."""
        folder = Path(output_dir or self.args.output_dir)
        if folder.name.startswith(PREFIX_CHECKPOINT_DIR):
            super()._save(output_dir, state_dict)
            if self.args.should_save:
                write_json(folder / START_FILE, self._start)
        elif self.args.should_save:
            self.accelerator.unwrap_model(self.model).save_pretrained(folder / ADAPTER_FOLDER)
            loading = {**(self.args.model_init_kwargs or {}), "trust_remote_code": self.args.trust_remote_code}
            merge(self._start["name_or_path"], folder / ADAPTER_FOLDER, **loading).save_pretrained(folder)
            self.processing_class.save_pretrained(folder)


class OLoRATrainer(AdapterTrainer):
    """
    [`AdapterTrainer`] of O-LoRA (Wang et al. 2023, arXiv 2310.14152, section 3): the subspace of the new adapter is kept
    orthogonal to those of earlier rounds, whose adapters are merged into the model.

    To the loss comes `lambda * sum |A_i A_t^T|` over modules, earlier rounds i and the entries of the product of shape
    (r, r). The paper's second penalty, on the size of the new adapter, has the factor 0 there and is left out.
    """

    def __init__(self, model: str, args: SFTConfig, adapter: Adapter, **kwargs: Any) -> None:
        super().__init__(model, args, adapter, **kwargs)
        # The parent draws with one seed in every round, but a new adapter is not to begin where the earlier ones did.
        set_seed(args.seed + len(adapter.earlier))
        for module in self.model.modules():
            if isinstance(module, LoraLayer):
                module.reset_lora_parameters(self.model.active_adapter, True)
        self._lambda = adapter.lora.o_lora_lambda
        self._earlier = {name: rows.to(args.device) for name, rows in earlier_subspaces(adapter.earlier).items()}

    def penalty(self) -> torch.Tensor:
        """What the loss gets: a scalar, with a gradient for each A of the new adapter."""
        model = self.accelerator.unwrap_model(self.model)
        # Named in the file without the name of the adapter
        new = {name.replace(f".{model.active_adapter}", ""): p for name, p in model.named_parameters()}
        with torch.autocast(self.args.device.type, enabled=False):
            products = [(rows @ new[name].float().T).abs().sum() for name, rows in self._earlier.items()]
        return self._lambda * torch.stack(products).sum()

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """Compute the parent's loss, and add the penalty, once in an optimizer step."""
        found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not model.training:
            return found
        # With the number of tokens given, losses of micro-batches are summed and not averaged.
        steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
        penalty = self.penalty() / steps
        return (found[0] + penalty, *found[1:]) if return_outputs else found + penalty


def adapter_trainer(stage: Stage, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> AdapterTrainer:
    """
    The trainer of a round that learns an adapter.

    Args:
        stage ([`~hft_trl.recipe.Stage`]):
            The round, which has an `adapter`.
        rows ([`~datasets.Dataset`]):
            What it learns from, encoded.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer.
    """
    kind = OLoRATrainer if stage.adapter.earlier else AdapterTrainer
    return kind(
        stage.model.model_name_or_path, stage.args, stage.adapter, train_dataset=rows, processing_class=tokenizer
    )


def lora_config(lora: LoRAArguments) -> LoraConfig:
    """PEFT's config of an adapter."""
    modules = lora.target_modules[0] if lora.target_modules == ["all-linear"] else lora.target_modules
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=modules,
    )


def check_adapter(stage: Stage) -> None:
    """
    Check that a model can have the adapter that is asked for, before anything is trained.

    Raises:
        [`HFTError`]: If it has no such modules, or would be sharded.
    """
    _refuse_shards(stage.args)
    model = stage.model
    structure = build_on_meta(model.model_name_or_path, model.model_revision, model.trust_remote_code)
    names = stage.adapter.lora.target_modules
    if names != ["all-linear"]:
        known = [name for name, _ in structure.named_modules()]
        unknown = [name for name in names if not any(f".{one}".endswith(f".{name}") for one in known)]
        if unknown:
            raise HFTError(
                f"lora.target_modules names {unknown[0]!r}, which {type(structure).__name__} has not: name modules such as "
                "q_proj, or all-linear alone."
            )
    with as_user_error("the adapter of section lora"), torch.device("meta"):
        adapted = get_peft_model(structure, lora_config(stage.adapter.lora))
    head, embedding = structure.get_output_embeddings(), structure.get_input_embeddings()
    for name, module in adapted.named_modules():
        tied = isinstance(module, LoraLayer) and structure.config.get_text_config().tie_word_embeddings
        if isinstance(module, LoraLayer) and (module is head or (tied and module is embedding)):
            raise HFTError(
                f"lora.target_modules reaches {name}, which can't be merged alone: leave output head and tied embedding out."
            )


def merge(model: str, adapter: str | Path, **loading: Any) -> PreTrainedModel:
    """
    A model with an adapter merged into its weights, which are rounded to the model's type.

    On the CPU and from the files, so that the same two give the same bits wherever they are merged.

    Args:
        model (`str`):
            Folder or hub id of the model that the adapter was trained on.
        adapter (`str` or `Path`):
            Folder of the adapter.
        **loading (`Any`):
            What the model was loaded with.

    Returns:
        [`~transformers.PreTrainedModel`]: The model, without a trace of PEFT.
    """
    whole = AutoModelForCausalLM.from_pretrained(model, **loading)
    with as_user_error(f"merging the adapter in {adapter}"):
        return PeftModel.from_pretrained(whole, adapter, torch_device="cpu").merge_and_unload(safe_merge=True)


def earlier_subspaces(rounds: Iterable[Path]) -> dict[str, torch.Tensor]:
    """
    What the adapters of earlier rounds read from each module's input: their matrices A, one below the other.

    Args:
        rounds (`Iterable[Path]`):
            Folders of the rounds.

    Returns:
        `dict[str, torch.Tensor]`: By name, in float32, of shape (rounds x r, features).
    """
    adapters = [load_peft_weights(str(folder / ADAPTER_FOLDER), device="cpu") for folder in rounds]
    # Of an embedding the matrix is called lora_embedding_A
    names = [name for name in adapters[0] if name.endswith(("lora_A.weight", "lora_embedding_A"))]
    return {name: torch.cat([adapter[name].float() for adapter in adapters]) for name in names}


def _refuse_shards(args: TrainingArguments) -> None:
    if fsdp_version(args) is not None or args.deepspeed_plugin is not None:
        raise HFTError(
            "an adapter is trained on a model that every process holds as a whole, but this is launched with "
            f"{'FSDP' if args.deepspeed_plugin is None else 'DeepSpeed'}: launch with "
            "accelerate_configs/single.yaml or ddp.yaml."
        )
