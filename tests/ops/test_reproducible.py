"""`reproducible`: a token's output has the same bits alone, in any company, and on any number of threads."""

from dataclasses import replace

import pytest
import torch

from moestro.core.errors import ConfigError


KINDS = [
    ("silu", True, False),
    ("silu", False, True),
    ("gelu", True, True),
    ("gelu", False, False),
    ("gelu_tanh", True, False),
    ("relu", False, True),
    ("swiglu_oss", True, True),
]


def part(case, tokens):
    """The same call for some of the tokens only, in the order given."""
    place = {token: i for i, token in enumerate(tokens.tolist())}
    kept = torch.tensor([token in place for token in case.token.tolist()], dtype=torch.bool)
    token = torch.tensor([place[token] for token in case.token[kept].tolist()], dtype=torch.int64)
    return replace(case, x=case.x[tokens], token=token, expert=case.expert[kept], weight=case.weight[kept])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("activation", "gated", "bias"), KINDS)
@pytest.mark.usefixtures("two_threads")
def test_company_changes_no_bit(make_case, threads, activation, gated, bias):
    torch.set_num_threads(threads)
    case = make_case(
        97, 6, dim=37, inner=21, out=19, routing="ragged", gated=gated, bias=bias, activation=activation,
        dtype=torch.float32, grad=False,
    )  # fmt: skip
    together = case.run("reproducible")
    torch.testing.assert_close(together, case.run("loop"), atol=1e-6 * together.abs().max().item(), rtol=1e-5)
    generator = torch.Generator().manual_seed(1)
    companies = [torch.tensor([token]) for token in range(97)]
    companies += [torch.randperm(97, generator=generator)[:count] for count in (2, 3, 5, 17, 60, 97)]
    for tokens in companies:
        assert torch.equal(part(case, tokens).run("reproducible"), together[tokens]), tokens


@pytest.mark.usefixtures("two_threads")
def test_threads_and_blocks_change_no_bit(make_case, monkeypatch):
    from moestro.ops import workers

    case = make_case(1500, 3, 2, dim=64, inner=48, routing="one_expert", dtype=torch.float32, grad=False)
    two = case.run("reproducible")
    torch.set_num_threads(1)
    assert torch.equal(case.run("reproducible"), two)
    monkeypatch.setattr(workers, "BLOCK", 499)  # the last block has 3 rows
    assert torch.equal(case.run("reproducible"), two)


def test_gradients_equal_the_loop(make_case):
    case = make_case(30, 5, 2, dim=8, inner=6, routing="ragged", bias=True)
    found, expected = case.gradients("reproducible"), case.gradients("loop")
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-10, rtol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


def test_narrow_experts_are_refused(make_case):
    with pytest.raises(ConfigError, match="at least 4 wide; got 3"):
        make_case(out=3).run("reproducible")
