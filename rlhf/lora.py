"""Which weights of a language model are trained: all, the blocks only, or low-rank adapters.

LoRA (Hu et al., 2021, arXiv 2106.09685) adds (alpha / rank) B A to each linear layer and trains A
and B only: gradients and Adam's state of a 270M model fall from gigabytes to megabytes. The
adapters are those of peft, put into the model in place, so that it keeps its class and its names.
"""

import copy
from typing import Literal

import torch
from torch import nn

from rlhf import UserError


def choose_trained(
    model: nn.Module, what: Literal["all", "blocks", "lora"], rank: int, seed: int
) -> None:
    """Set requires_grad in place; "lora" adds adapters to all linear layers but the LM head.

    "blocks" leaves embedding and LM head as they are: 63 % of the weights of a 270M model with
    262,144 words. The same seed gives the same adapters on every process.
    """
    if what == "all":
        return
    if what == "blocks":
        for part in (model.get_input_embeddings(), model.get_output_embeddings()):
            part.requires_grad_(False)
        return
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UserError("--train lora: pip install peft") from error
    head = model.get_output_embeddings()
    names = {
        name.rpartition(".")[2]
        for name, part in model.named_modules()
        if part is not head and type(part).__name__ in ("Linear", "Conv1D")
    }
    config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=sorted(names))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model)


def merged(model: nn.Module) -> nn.Module:
    """A copy whose adapters are added into the weights they belong to; the model if it has none."""
    if not any(hasattr(part, "lora_A") for part in model.modules()):
        return model
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, part in list(parent.named_children()):
            if hasattr(part, "lora_A"):
                part.merge()
                setattr(parent, name, part.get_base_layer())
    return model
