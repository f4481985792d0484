"""One mixture layer against a dense FFN of the same active FLOPs and Transformers' experts implementations.

The arms share one routing and one set of expert weights; what is timed is the experts alone (`experts`), or the whole
layer with its router (`layer`): MoELayer against the stock Qwen3-MoE block. Forward+backward includes the gradients
of everything and their clearing.
"""

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moestro import ops
from moestro.core.memory import peak_bytes, restart_peak
from moestro.testing.bench.harness import Arm, Row, interleave, time_rows


@dataclass(frozen=True)
class Shape:
    """hidden D, experts E, inner width I of one expert, top-k K."""

    hidden: int = 512
    experts: int = 64
    inner: int = 256
    top_k: int = 8

    def __str__(self) -> str:
        return f"hidden {self.hidden}, {self.experts} experts of {self.inner}, top-{self.top_k}"


PEERS = ("eager", "grouped_mm")

Forward = Callable[[], Tensor]


class Arms:
    """The same layer three ways, and its dense twin (inner width K * I)."""

    def __init__(self, shape: Shape, tokens: int, peers: tuple[str, ...] = PEERS, *, router: bool = False) -> None:
        torch.manual_seed(0)
        self.shape, self.router, self.peers = shape, router, peers
        self.x_TD = torch.randn(tokens, shape.hidden, requires_grad=True)
        self.grad_TD = torch.randn(tokens, shape.hidden)
        self.block = _stock_block(shape)
        self.layer = our_layer(self.block)
        self.dense = _dense(shape.hidden, shape.inner * shape.top_k)
        with torch.no_grad():
            _, weight_TK, self.expert_TK = self.block.gate(self.x_TD)
        self.weight_TK = weight_TK.detach().requires_grad_()
        self.token_N = torch.arange(tokens).repeat_interleave(shape.top_k)

    def ours(self) -> Tensor:
        """MoELayer, or its experts."""
        if self.router:
            return self.layer(self.x_TD)  # type: ignore[no-any-return]
        bank = self.layer.bank
        chosen = (self.token_N, self.expert_TK.reshape(-1), self.weight_TK.reshape(-1))
        return ops.fused_ffn(self.x_TD, *chosen, len(self.x_TD), bank.weights(), bank.activation)

    def peer(self, implementation: str) -> Tensor:
        """The stock block, or its experts."""
        self.block.experts.config._experts_implementation = implementation
        y: Tensor
        if self.router:
            y = self.block(self.x_TD.unsqueeze(0))
        else:
            y = self.block.experts(self.x_TD, self.expert_TK, self.weight_TK)
        return y

    def forwards(self) -> dict[str, Forward]:
        """One forward of each arm, by name."""
        arms: dict[str, Forward] = {"ours": self.ours, "dense": partial(self.dense, self.x_TD)}
        return arms | {name: partial(self.peer, name) for name in self.peers}

    def steps(self) -> dict[str, Arm]:
        """Forward, backward and clearing of the gradients of each arm."""
        return {name: partial(self._step, forward) for name, forward in self.forwards().items()}

    def _step(self, forward: Forward) -> None:
        y = forward()
        y.backward(self.grad_TD.view_as(y))  # type: ignore[no-untyped-call]
        self.x_TD.grad = self.weight_TK.grad = None
        for module in (self.block, self.layer, self.dense):
            module.zero_grad(set_to_none=True)


def _stock_block(shape: Shape) -> Any:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    config = Qwen3MoeConfig(
        hidden_size=shape.hidden,
        moe_intermediate_size=shape.inner,
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        norm_topk_prob=True,
    )
    block = Qwen3MoeSparseMoeBlock(config)
    for name, parameter in block.named_parameters():
        # Logits of standard deviation 1: a nearly even load, as a trained and balanced router gives.
        scale = parameter.shape[-1] ** -0.5
        nn.init.normal_(parameter, std=scale if "gate.weight" in name else 0.02)
    return block


def our_layer(block: Any) -> Any:
    """MoELayer with the weights of a stock Qwen3-MoE block."""
    from moestro.core.bank import StackedFFN
    from moestro.core.layer import MoELayer
    from moestro.core.registry import method

    experts = block.experts
    _, rows, dim = experts.gate_up_proj.shape
    bank = StackedFFN(experts.num_experts, dim, rows // 2)
    softmax_topk: Any = method("train.softmax_topk").module
    config = softmax_topk.Config(num_experts=experts.num_experts, top_k=block.gate.top_k)
    router = softmax_topk.SoftmaxTopK(dim, config)
    with torch.no_grad():
        bank.up_weight.copy_(experts.gate_up_proj)
        bank.down_proj.copy_(experts.down_proj)
        router.weight.copy_(block.gate.weight)
    return MoELayer(router, bank, site="mlp")


def _dense(hidden: int, inner: int) -> Any:
    from transformers import Qwen3Config
    from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

    return Qwen3MLP(Qwen3Config(hidden_size=hidden, intermediate_size=inner))


def compare(shape: Shape, tokens: int, rounds: int, *, backward: bool, router: bool) -> list[Row]:
    """Rows of one case: ours against dense and every peer."""
    arms = Arms(shape, tokens, router=router)
    case = f"{'layer' if router else 'experts'} ({shape}), {tokens} tokens"
    if backward:
        return time_rows(case, "forward+backward", interleave(arms.steps(), rounds))
    with torch.no_grad():
        # Short calls: more rounds cost little and settle the median.
        return time_rows(case, "forward", interleave(arms.forwards(), rounds * (20 if tokens == 1 else 4), warmup=3))


def growth(few: int, many: int, tokens: int, rounds: int) -> Row:
    """Our forward+backward with many experts against the same with few, same active size."""
    small, large = (Arms(Shape(experts=experts), tokens, ()).steps()["ours"] for experts in (few, many))
    seconds = interleave({"ours": large, "few": small}, rounds)
    row = time_rows(f"experts ({Shape(experts=many)}), {tokens} tokens", "forward+backward", seconds)[0]
    return Row(**(asdict(row) | {"peer_name": f"ours with {few} experts"}))


def memory(shape: Shape, tokens: int) -> Row:
    """Peak memory of three steps beside expert weights and their gradients, against the whole of the dense twin's."""
    ours, dense = (_peak_in_child(shape, tokens, arm) for arm in ("ours", "dense"))
    experts = shape.experts * 3 * shape.hidden * shape.inner * 4
    net = ours - 2 * experts
    case = f"experts ({shape}), {tokens} tokens"
    metric = "peak memory of a step without expert weights and gradients"
    return Row(case, metric, "MB", net / 1e6, "dense", dense / 1e6, dense / net, 0.0)


def _peak_in_child(shape: Shape, tokens: int, arm: str) -> int:
    """Bytes, measured in a process of its own: no other arm has touched its heap."""
    code = "import sys; from moestro.testing.bench.train_layer import print_peak; print_peak(*sys.argv[1:])"
    command = [sys.executable, "-c", code, json.dumps(asdict(shape)), str(tokens), arm]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    return int(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout.split()[-1])


def print_peak(shape: str, tokens: str, arm: str) -> None:
    """Print how far the resident memory of this process rises over that before the arm's weights exist."""
    arms = Arms(Shape(**json.loads(shape)), int(tokens), ())
    step = arms.steps()[arm]
    kept = arms.layer if arm == "ours" else arms.dense
    weights = sum(parameter.numel() * 4 for parameter in kept.parameters())
    other = arms.dense if arm == "ours" else arms.layer
    other.to_empty(device="meta")
    arms.block.to_empty(device="meta")
    ctypes.CDLL(None).malloc_trim(0)  # what building the arms left behind must not serve the step unseen
    before = restart_peak()
    for _ in range(3):
        step()
    print(peak_bytes() - before + weights)


def run(rounds: int) -> list[Row]:
    """All cases of the layer."""
    shape = Shape()
    rows = []
    for router in (False, True):
        for tokens, backward in ((4096, True), (256, False), (256, True), (1, False)):
            rows += compare(shape, tokens, rounds, backward=backward, router=router)
    rows.append(growth(8, 256, 4096, rounds))
    if sys.platform == "linux":
        rows.append(memory(shape, 4096))
    return rows
