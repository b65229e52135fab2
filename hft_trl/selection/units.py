"""Find the units of any model: what can learn, in which layer, of which category."""

import copy
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import GradientCheckpointingLayer, PreTrainedModel
from transformers.initialization import no_init_weights

from hft_trl.errors import HFTError, explained
from hft_trl.selection.categories import OuterParts, layer_category, own_class_names
from hft_trl.weights import named_modules, named_parameters, numel

_TOWER = re.compile(r"(^|_)(vision|visual|image|img|video|audio|speech|multi_?modal|mm)(_|$)", re.IGNORECASE)


@dataclass(frozen=True)
class Unit:
    """Store the smallest piece that learns or stays frozen: a module's weight with its bias."""

    names: tuple[str, ...]  # of its parameters
    size: int  # number of parameters
    category: str  # one of `LAYER_CATEGORIES` or `OUTER_CATEGORIES`
    layer: int | None  # number of the layer over all stacks of the model, `None` outside of the layers
    slot: str  # name inside the layer, such as "self_attn.q_proj"; outside of the layers the whole name
    tied: bool = False  # whether it is both input embedding and output head


def find_units(model: PreTrainedModel, exclude: Sequence[str] = (), without: Collection[str] = ()) -> list[Unit]:
    """
    Find the units of a decoder-only causal language model, in the order of its parameters.

    A parameter is left out if the model's class creates it frozen (router correction biases, sinusoidal positions), if
    it is not floating point, if it belongs to a tower for pictures or sound, if a regular expression of `exclude` is
    found in its name, or if its name is in `without`. What an earlier selection or the user has frozen is still a
    unit. The model may be on any device and is not changed.
    """
    _check_model(model)
    modules = named_modules(model)
    towers = _find_towers(model, modules)
    layers = _find_layers(model, modules, towers)
    parameters = dict(named_parameters(model))
    selectable = _selectable_sizes(model, parameters, towers, exclude).items()
    sizes = {name: size for name, size in selectable if name not in without}
    classes = own_class_names(modules)
    outer = OuterParts(model, modules, parameters)

    groups: dict[tuple[str, str], list[str]] = {}
    for name in sizes:
        owner, _, leaf = name.rpartition(".")
        groups.setdefault((owner, _stem(owner, leaf, sizes)), []).append(name)
    units = []
    for (owner, stem), names in groups.items():
        size = sum(sizes[name] for name in names)
        leaf = "" if stem == "weight" else stem
        layer = next((path for path in _ancestors(owner) if path in layers), None)
        if layer is None:
            tied = outer.is_tied(names[0])
            units.append(Unit(tuple(names), size, outer.category(names[0]), None, _join(owner, leaf), tied))
            continue
        number, list_name = layers[layer]
        words = [classes[layer], list_name] if list_name else []
        for path in _ancestors(owner):
            if len(path) > len(layer):
                words += [classes[path], path.rpartition(".")[2]]
        category = layer_category([*words, leaf], classes[layer])
        slot = _join(list_name, owner[len(layer) + 1 :], leaf) or stem
        units.append(Unit(tuple(names), size, category, number, slot))
    if not any(unit.layer is not None for unit in units):
        why = f"hft.exclude {list(exclude)!r} matches all that it has" if exclude else "none was found"
        why = f"{len(without)} parameters had requires_grad=False before, such as {min(without)}" if without else why
        remedy = ", such as one after model.requires_grad_(True)" if without else ""
        raise HFTError(
            f"The model {type(model).__name__} has no layers to select from ({why}): HFT needs a decoder whose layers "
            f"hold parameters that can learn{remedy}."
        )
    return units


def _check_model(model: nn.Module) -> None:
    problem = None
    if any(type(module).__module__.split(".")[0] == "peft" for module in model.modules()):
        problem = "holds PEFT adapters: HFT and adapters exclude each other, so pass it without them (or merge them)"
    elif not isinstance(model, PreTrainedModel):
        problem = "is no transformers model: HFT needs a causal language model, such as LlamaForCausalLM"
    elif (quantizer := vars(model).get("hf_quantizer")) is not None:  # transformers has packed the weights
        kind = type(quantizer.quantization_config).__name__
        problem = f"is quantized ({kind}): HFT trains whole matrices, so load it without a quantization_config"
    elif model.config.is_encoder_decoder or not model.can_generate() or model.get_output_embeddings() is None:
        problem = "is no decoder-only causal language model: load it with AutoModelForCausalLM"
    if problem is not None:
        raise HFTError(f"The model {type(model).__name__} {problem}.")


def frozen_by_hft(model: PreTrainedModel) -> frozenset[str]:
    """Return the names of the parameters that a selection froze on this model object."""
    return vars(model).get("_hft_frozen", frozenset())


def mark_frozen(model: PreTrainedModel, names: Iterable[str]) -> None:
    """Note which parameters of a model object a selection froze. The user or the class froze all others."""
    model._hft_frozen = frozenset(names)


def frozen_by_user(model: PreTrainedModel) -> frozenset[str]:
    """Return the names of the frozen parameters that neither a selection nor the model's class has frozen."""
    frozen = {name for name, parameter in named_parameters(model) if not parameter.requires_grad}
    unexplained = frozen - frozen_by_hft(model)
    return frozenset(unexplained - _frozen_by_class(model, unexplained))


def _frozen_by_class(model: PreTrainedModel, names: Collection[str]) -> set[str]:
    """Return those of the names that the model's class creates frozen, such as a router's biases."""
    if not names:  # with tens of thousands of modules the copy takes seconds
        return set()
    try:
        # Some classes draw random numbers even on the meta device.
        with torch.device("meta"), no_init_weights(), torch.random.fork_rng(devices=[]):
            twin = type(model)(copy.deepcopy(model.config))
    except Exception as error:
        raise HFTError(
            f"The model {type(model).__name__} cannot be rebuilt from its own config, which HFT needs to learn "
            f"what the class itself keeps frozen ({type(error).__name__}: {explained(error)}): give its constructor "
            "no required argument but the config."
        ) from error
    made = twin.named_parameters(remove_duplicate=False)
    return {name for name, parameter in made if name in names and not parameter.requires_grad}


def _selectable_sizes(
    model: PreTrainedModel, parameters: dict[str, nn.Parameter], towers: set[str], exclude: Sequence[str]
) -> dict[str, int]:
    """Return the number of parameters by name, of those that could learn and are not excluded."""
    by_class = _frozen_by_class(model, {name for name, p in parameters.items() if not p.requires_grad})
    unmatched = set(exclude)
    sizes = {}
    for name, parameter in parameters.items():
        hits = {pattern for pattern in exclude if re.search(pattern, name)}
        unmatched -= hits
        if hits or name in by_class or not parameter.is_floating_point():
            continue
        if towers and any(path in towers for path in _ancestors(name)):
            continue
        sizes[name] = numel(parameter)
    if unmatched:
        raise HFTError(
            f"hft.exclude holds {sorted(unmatched)[0]!r}, which matches no parameter of {type(model).__name__}: fix "
            "the pattern or leave it out."
        )
    return sizes


def _find_towers(model: PreTrainedModel, modules: dict[str, nn.Module]) -> set[str]:
    """Return the paths of vision and audio towers and of their projections into the text model."""
    embedding = model.get_input_embeddings()
    way_of_text = {"", *_ancestors(next(path for path, module in modules.items() if module is embedding))}
    towers = set()
    for path, module in modules.items():
        named, reads_text = _TOWER.search(path.rpartition(".")[2]), True
        if isinstance(module, PreTrainedModel):
            reads_text = module.main_input_name == "input_ids" and "text" in module.input_modalities
        if path not in way_of_text and (named or not reads_text):
            towers.add(path)
    return towers


def _find_layers(
    model: PreTrainedModel, modules: dict[str, nn.Module], towers: set[str]
) -> dict[str, tuple[int, str]]:
    """
    Return the number of each layer by its path, and the name of its list.

    The name is empty unless a layer is spread over several lists: one of all attentions, one of all norms and so on.
    """
    lists: dict[str, nn.ModuleList] = {}
    for path, module in modules.items():
        inside = any(above in towers or above in lists for above in _ancestors(path))
        if isinstance(module, nn.ModuleList) and len(module) and not inside:
            lists[path] = module
    whole = set(model._no_split_modules or ())
    stacks = [
        path
        for path, module in lists.items()
        if all(isinstance(layer, GradientCheckpointingLayer) or type(layer).__name__ in whole for layer in module)
    ]
    if stacks or not lists:
        paths = [f"{stack}.{index}" for stack in stacks for index in range(len(lists[stack]))]
        return {path: (number, "") for number, path in enumerate(paths)}
    largest = max(lists, key=lambda path: sum(map(numel, lists[path].parameters())))
    parent, depth = largest.rpartition(".")[0], len(lists[largest])
    beside = [path for path in lists if path.rpartition(".")[0] == parent and len(lists[path]) == depth]
    names = {path: path.rpartition(".")[2] if len(beside) > 1 else "" for path in beside}
    return {f"{path}.{index}": (index, name) for path, name in names.items() for index in range(depth)}


def _stem(owner: str, leaf: str, sizes: dict[str, int]) -> str:
    """Return the name that a bias shares with its weight: `x_bias` has that of `x` or `x_weight`."""
    for ending in ("_bias", "bias"):
        if leaf.endswith(ending):
            stem = leaf.removesuffix(ending)
            for weight in (stem, f"{stem}_weight" if ending == "_bias" else f"{stem}weight"):
                if _join(owner, weight) in sizes:
                    return weight
    return leaf


def _ancestors(path: str) -> Iterator[str]:
    """`a.b.c` -> `a`, `a.b`, `a.b.c`."""
    parts = path.split(".") if path else []
    return (".".join(parts[: number + 1]) for number in range(len(parts)))


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)
