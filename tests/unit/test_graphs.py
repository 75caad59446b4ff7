"""Recording and playing back: off a GPU every call runs; on one, later calls are played and equal."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from latentindigo.graphs import Replay
from latentindigo.guidance import GuidanceConfig, LatentINN, LearnedForward
from latentindigo.prior import Calls, LatentPrior
from tiny import tiny_pipeline
from tolerances import assert_close


def term(device: str, w_d: float = 0.5) -> tuple[LatentINN, Calls]:
    """LatentINN of the tiny model, counting."""
    pipe, calls = tiny_pipeline().to(device), Calls()
    prior: LatentPrior = pipe.prior.counting(calls)

    def count(passes: int) -> None:
        calls.inn += passes

    inn = pipe.latent_inn
    assert inn is not None
    model = LearnedForward(inn, torch.randn(1, 8, device=device), 1, None, count)
    target = torch.randn(1, 4, 4, 4, device=device)
    return LatentINN(prior, model, target, 64 * 64, GuidanceConfig(w_d=w_d), torch.zeros(1, device=device)), calls


def test_a_cpu_runs_every_call() -> None:
    seen: list[float] = []

    def double(x: Tensor) -> Tensor:
        seen.append(float(x.sum()))
        return 2 * x

    replay = Replay()
    for k in range(4):
        assert torch.equal(replay(double, torch.full((2,), float(k))), torch.full((2,), 2.0 * k))
    assert seen == [0, 2, 4, 6]


@pytest.mark.parametrize("w_d", [0.0, 0.5])
def test_each_step_counts_what_it_runs(w_d: float) -> None:
    data, calls = term("cpu", w_d)
    for _ in range(3):
        data.descent(torch.randn(1, 4, 8, 8), torch.ones(1))
    assert calls.inn == 3 * (2 if w_d else 1)


def test_a_copy_of_a_term_records_for_itself() -> None:
    data, _ = term("cpu")
    twin = copy.copy(data)
    assert twin._gradient is not data._gradient
    assert twin.forward_model is data.forward_model


@pytest.mark.gpu
@pytest.mark.parametrize("rule", ["projection", "descent"])
def test_what_is_played_is_what_would_be_computed(rule: str) -> None:
    data, calls = term("cuda")
    gain = torch.ones(1, device="cuda")
    for k in range(4):
        z = torch.randn(1, 4, 8, 8, device="cuda", generator=torch.Generator("cuda").manual_seed(k))
        fresh = copy.copy(data)
        before = calls.inn
        found = getattr(data, rule)(z, gain)
        assert calls.inn == before + 2
        assert_close(found, getattr(fresh, rule)(z, gain))
    record = data._distance if rule == "projection" else data._gradient
    assert record._graph is not None
    other = torch.randn(1, 4, 8, 4, device="cuda")
    with pytest.raises((ValueError, RuntimeError)):  # Another size is not played: it runs, and does not fit the target.
        getattr(data, rule)(other, gain)
