"""Train LoRA adapters: one for all rounds (LoRASeqFT), or a new, orthogonal one in each (O-LoRA)."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import load_peft_weights
from transformers import AutoModelForCausalLM, PreTrainedModel, set_seed
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import SFTConfig, SFTTrainer

from hft_trl.backends.fsdp import sharded_by
from hft_trl.checkpoints.resumable import ResumableMixin
from hft_trl.continual.continual_arguments import ADAPTER_FOLDER, Adapter, LoRAArguments
from hft_trl.errors import HFTError, as_user_error
from hft_trl.recipe.arguments import ModelArguments
from hft_trl.saved_models.model_card import complete


class AdapterTrainer(ResumableMixin, SFTTrainer):
    """Train a LoRA adapter as TRL does, and save the merged model, with the adapter in `adapter/`."""

    def __init__(self, model: str, args: SFTConfig, adapter: Adapter, **kwargs: Any) -> None:
        super().__init__(model=model, args=args, peft_config=lora_config(adapter.lora), **kwargs)
        self._start = model
        if adapter.start is not None:
            self._load_from_checkpoint(str(adapter.start / ADAPTER_FOLDER))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """Save a checkpoint as the parent does, or at the end the merged model, tokenizer and adapter."""
        folder = Path(output_dir or self.args.output_dir)
        if folder.name.startswith(PREFIX_CHECKPOINT_DIR):
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            self.accelerator.unwrap_model(self.model).save_pretrained(folder / ADAPTER_FOLDER)
            loading = {**(self.args.model_init_kwargs or {}), "trust_remote_code": self.args.trust_remote_code}
            merge(self._start, folder / ADAPTER_FOLDER, **loading).save_pretrained(folder)
            self.processing_class.save_pretrained(folder)

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | Sequence[str] | None = None, tags: Any = None
    ) -> None:
        """Write TRL's model card with the names of the start model and the data, as HFT's trainers do."""
        super().create_model_card(model_name or Path(self.args.output_dir).name, None, tags)
        if self.is_world_process_zero():
            complete(self.args.output_dir, None, dataset_name, self._start)


class OLoRATrainer(AdapterTrainer):
    """
    Train an adapter with O-LoRA (Wang et al. 2023, https://huggingface.co/papers/2310.14152).

    The penalty `lambda * sum |A_i A_t^T|` over modules, earlier rounds i and the entries of the (r, r) products keeps
    the new subspace orthogonal to earlier ones. The paper's second penalty has the factor 0 there and is left out.
    """

    def __init__(self, model: str, args: SFTConfig, adapter: Adapter, **kwargs: Any) -> None:
        super().__init__(model, args, adapter, **kwargs)
        # The parent draws with the same seed in every round, but adapters must start from different values
        set_seed(args.seed + len(adapter.earlier))
        for module in self.model.modules():
            if isinstance(module, LoraLayer):
                module.reset_lora_parameters(self.model.active_adapter, True)
        self._lambda = adapter.lora.o_lora_lambda
        self._earlier = {name: rows.to(args.device) for name, rows in earlier_subspaces(adapter.earlier).items()}

    def penalty(self) -> torch.Tensor:
        """Compute the penalty, a scalar with a gradient for each matrix A of the new adapter."""
        model = self.accelerator.unwrap_model(self.model)
        # Names in the file lack the name of the adapter
        new = {name.replace(f".{model.active_adapter}", ""): p for name, p in model.named_parameters()}
        with torch.autocast(self.args.device.type, enabled=False):
            products = [(rows @ new[name].float().T).abs().sum() for name, rows in self._earlier.items()]
        return self._lambda * torch.stack(products).sum()

    def compute_loss(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Compute the parent's loss in training, plus the penalty once per optimizer step."""
        # With the number of tokens given, losses of micro-batches are summed and not averaged
        summed = kwargs.get("num_items_in_batch") is not None
        penalty = self.penalty() / (self.current_gradient_accumulation_steps if summed else 1)
        return super().compute_loss(*args, **kwargs) + penalty


def lora_config(lora: LoRAArguments) -> LoraConfig:
    settings = asdict(lora)
    del settings["o_lora_lambda"]
    if lora.target_modules == ["all-linear"]:
        settings["target_modules"] = "all-linear"
    return LoraConfig(task_type="CAUSAL_LM", **settings)


def check_adapter(model: ModelArguments, args: SFTConfig, adapter: Adapter) -> None:
    """Check that a round's adapter can be trained and merged, before anything is trained."""
    if (found := sharded_by(args)) is not None:
        raise HFTError(
            f"this is launched with {found}, but adapters need the whole model in each process: launch with "
            "accelerate_configs/single.yaml or ddp.yaml."
        )
    names = adapter.lora.target_modules
    structure = model.structure()
    known = [name for name, _ in structure.named_modules()]
    # PEFT does not report an unknown name if another one is known
    for name in names if names != ["all-linear"] else []:
        if not any(f".{module}".endswith(f".{name}") for module in known):
            raise HFTError(
                f"lora.target_modules names {name!r}, which {type(structure).__name__} does not have: name modules "
                "such as q_proj, or all-linear alone."
            )
    with as_user_error("the adapter of section lora"), torch.device("meta"):
        get_peft_model(structure, lora_config(adapter.lora))  # puts its modules into the structure
    unmerged = [structure.get_output_embeddings()]
    if structure.config.get_text_config().tie_word_embeddings:
        unmerged.append(structure.get_input_embeddings())
    if any(isinstance(module, LoraLayer) for module in unmerged):
        raise HFTError(f"lora.target_modules {names} reaches the head or a tied embedding: leave them out.")


def merge(model: str, adapter: str | Path, **loading: Any) -> PreTrainedModel:
    """Merge a folder's adapter into a model, on the CPU for the same bits on every machine."""
    whole = AutoModelForCausalLM.from_pretrained(model, **loading)
    with as_user_error(f"merging the adapter in {adapter}"):
        return PeftModel.from_pretrained(whole, adapter, torch_device="cpu").merge_and_unload(safe_merge=True)


def earlier_subspaces(rounds: Iterable[Path]) -> dict[str, torch.Tensor]:
    """Read the adapters' matrices A by name, in float32, each of shape (rounds x r, features)."""
    adapters = [load_peft_weights(str(folder / ADAPTER_FOLDER), device="cpu") for folder in rounds]
    # The matrix of an embedding is called lora_embedding_A
    names = [name for name in adapters[0] if name.endswith(("lora_A.weight", "lora_embedding_A"))]
    return {name: torch.cat([adapter[name].float() for adapter in adapters]) for name in names}
