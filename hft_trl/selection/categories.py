"""
Categories of units, by the names of the classes and attributes that lead to them.

In a layer the first level that says attention, feed-forward or mixer decides; its class outranks the attribute that
holds it, which may be a mere "mixer" or "temporal_block" for either kind. A norm is a norm wherever it stands.
"""

import re
from functools import lru_cache

from torch import nn
from transformers import PreTrainedModel

# A mixer is Mamba, a gated delta net, a short convolution, ...
LAYER_CATEGORIES = ("attention", "feed_forward", "norm", "mixer", "other")
OUTER_CATEGORIES = ("embedding", "lm_head", "final_norm", "outside")

_NORM = re.compile(r"norm(?!al)|(^|_)ln(_|\d|$)", re.IGNORECASE)
_KINDS = {
    "attention": re.compile(r"attention|attn|indexer|(^|_)(sinks?|mla)(_|$)", re.IGNORECASE),
    "feed_forward": re.compile(
        r"mlp|ffn|feed_?forward|expert|router|moe(?![a-z])|(^|_)ff(_|\d|$)|^fc_?\d|^(intermediate|output)$",
        re.IGNORECASE,
    ),
    "mixer": re.compile(r"mamba|mixer|delta_?net|recurrent|r?g_?lru|lstm|ssm|(^|_)conv|short_?conv", re.IGNORECASE),
}
# "post_attention_residual" and "MambaDecoderLayer" say where something stands, not what it is.
_PLACE = re.compile(r"^(pre|post)_|DecoderLayer$")
_EMBEDDING = re.compile(r"(?<!un)emb|(^|_)w[tp]e(_|$)", re.IGNORECASE)
_ROLE = re.compile(
    r"(Text)?(Model|ForCausalLM|ForConditionalGeneration|(With)?LMHeadModel|(Decoder|Encoder)(Wrapper)?)$"
)


def own_class_names(modules: dict[str, nn.Module]) -> dict[str, str]:
    """Return the class name of each module without the model's name, which may itself say "Moe"."""
    names = {type(module).__name__ for module in modules.values() if isinstance(module, PreTrainedModel)}
    prefixes = sorted({_ROLE.sub("", name) for name in names}, key=lambda name: (-len(name), name))
    own: dict[type, str] = {}
    for module in modules.values():
        if type(module) not in own:
            name = type(module).__name__
            prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), "")
            own[type(module)] = name[len(prefix) :]
    return {path: own[type(module)] for path, module in modules.items()}


def layer_category(words: list[str], layer_class: str) -> str:
    """Return the category of a unit in a layer, from the names on the path to it."""
    if any(_NORM.search(word) for word in words):
        return "norm"
    return next((kind for word in [*words, layer_class] if (kind := _kind(word))), "other")


@lru_cache(maxsize=4096)
def _kind(word: str) -> str | None:
    if _PLACE.search(word):
        return None
    return next((kind for kind, pattern in _KINDS.items() if pattern.search(word)), None)


class OuterParts:
    """Categories of what lies outside of the layers."""

    def __init__(
        self, model: PreTrainedModel, modules: dict[str, nn.Module], parameters: dict[str, nn.Parameter]
    ) -> None:
        self.modules = modules
        self.base = next(path for path, module in modules.items() if module is model.base_model)
        head = model.get_output_embeddings()
        self.head = {id(parameter) for parameter in head.parameters()}
        self.embedding = {id(parameter) for parameter in model.get_input_embeddings().parameters()}
        self.parameters = parameters

    def is_tied(self, name: str) -> bool:
        return id(self.parameters[name]) in self.head & self.embedding

    def category(self, name: str) -> str:
        key = id(self.parameters[name])
        owner = name.rpartition(".")[0]
        if key in self.embedding:
            return "embedding"
        # Whatever stands beside the base model makes logits of its hidden states: BERT's transform before the head.
        if key in self.head or (self.base and not name.startswith(self.base + ".")):
            return "lm_head"
        attribute = owner.rpartition(".")[2]
        norm = any(_NORM.search(word) for word in (type(self.modules[owner]).__name__, attribute))
        # Lfm2 calls the norm after its last layer "embedding_norm".
        if norm and (attribute == "embedding_norm" or not re.search("emb|proj", name, re.IGNORECASE)):
            return "final_norm"
        if isinstance(self.modules[owner], nn.Embedding) or _EMBEDDING.search(name):
            return "embedding"
        return "outside"
