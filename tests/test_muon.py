"""Muon: what it orthogonalises, and that all else is SGD."""

from __future__ import annotations

import pytest
import torch
from helpers import TINY_MOBILE, random_supernet, tiny_config, tiny_space
from torch import nn

from proard.training.muon import Muon, orthogonalised
from proard.training.optimizer import make_optimizer


def gradients(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def stepped(make, grads, *, steps=3, start=0.5):
    """Parameters that all start at one value, after some steps with gradients that change from step to step."""
    parameters = [nn.Parameter(torch.full_like(grad, start)) for grad in grads]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer = make(parameters)
    for step in range(steps):
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad.copy_(grad + step * grad.flip(0))
        optimizer.step()
    return parameters


def test_singular_values_come_near_one_and_vectors_stay():
    for matrix in gradients((24, 8), (8, 24), (16, 16)):
        (found,) = orthogonalised([matrix])
        scale = max(1.0, matrix.shape[0] / matrix.shape[1]) ** 0.5
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        kept = torch.diag(u.T @ found @ vh.T) / scale
        large = s > 0.05 * matrix.norm()
        assert large.any()
        assert (kept[large] > 0.6).all()
        assert (kept[large] < 1.3).all()
        rest = u.T @ found @ vh.T / scale - torch.diag(kept)
        assert rest.abs().max() < 1e-4, "the factors U and V are the matrix's own"


def test_matrices_of_one_shape_do_not_meet():
    weights = gradients((8, 4, 3, 3), (6, 4, 1, 1), (8, 4, 3, 3))
    together = orthogonalised(weights)
    for weight, found in zip(weights, together, strict=True):
        torch.testing.assert_close(found, orthogonalised([weight])[0])
        assert found.shape == weight.shape


def test_the_scale_of_a_gradient_changes_nothing():
    (weight,) = gradients((8, 4, 3, 3))
    torch.testing.assert_close(orthogonalised([weight])[0], orthogonalised([100 * weight])[0])


def test_steps_are_those_of_torch_muon():
    """Torch's takes two axes only and computes in bfloat16."""
    grads = gradients((12, 20), (20, 12))
    group = {"lr": 0.1, "weight_decay": 0.2}
    ours = stepped(lambda found: Muon([{"params": found, "orthogonal": True, **group}], momentum=0.9), grads)
    torchs = stepped(lambda found: torch.optim.Muon(found, momentum=0.9, nesterov=True, **group), grads)
    for own, other in zip(ours, torchs, strict=True):
        assert (own - other).norm() < 0.02 * (own - 0.5).norm()


def test_in_bfloat16_singular_values_come_as_near_to_one():
    for matrix in gradients((24, 8), (8, 24), (64, 64)):
        (found,), (exact,) = orthogonalised([matrix], dtype=torch.bfloat16), orthogonalised([matrix])
        assert found.dtype is torch.float32
        values = torch.linalg.svdvals(found) / max(1.0, matrix.shape[0] / matrix.shape[1]) ** 0.5
        assert values.max() < 1.3
        assert torch.nn.functional.cosine_similarity(found.flatten(), exact.flatten(), dim=0) > 0.99


def test_a_captured_step_reads_this_steps_gradients_and_rates():
    grads, captured, replays = gradients((8, 4, 3, 3), (5,)), [], []
    kinds = [{"orthogonal": True, "weight_decay": 0.01}, {}]

    def capture(body):
        captured.append(body)
        return lambda: (replays.append(1), body())

    def trained(**how):
        parameters = [nn.Parameter(torch.ones_like(grad)) for grad in grads]
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        groups = [{"params": [each], **kind} for each, kind in zip(parameters, kinds, strict=True)]
        optimizer = Muon(groups, momentum=0.9, **how)
        optimizer.found_inf = torch.zeros(())
        for step in range(6):
            if step == 4:  # elsewhere in memory: a graph of the old place would be wrong
                parameters[0].grad = torch.empty_like(parameters[0])
            for parameter, grad, group in zip(parameters, grads, optimizer.param_groups, strict=True):
                parameter.grad.copy_(grad + step * grad.flip(0))
                group["lr"] = 0.1 / (1 + step)
            optimizer.found_inf.fill_(float(step == 2))
            optimizer.step()
        return parameters

    for own, other in zip(trained(capture=capture), trained(), strict=True):
        assert torch.equal(own, other)
    assert len(captured) == 2
    assert len(replays) == 4  # all but the first step and the one after the move


def test_all_else_moves_by_sgd():
    grads = gradients((5,), (4, 3), (6, 1, 3, 3))
    group = {"lr": 0.1, "weight_decay": 0.01}
    ours = stepped(lambda found: Muon([{"params": found, **group}], momentum=0.9), grads)
    sgd = stepped(lambda found: torch.optim.SGD(found, momentum=0.9, nesterov=True, **group), grads)
    for own, other in zip(ours, sgd, strict=True):
        torch.testing.assert_close(own, other)


def test_a_failed_step_leaves_weights_and_momentum():
    grads = gradients((8, 4, 3, 3), (5,))
    parameters = [nn.Parameter(torch.ones_like(grad)) for grad in grads]
    optimizer = Muon(
        [
            {"params": parameters[:1], "orthogonal": True, "lr": 0.1, "weight_decay": 0.1},
            {"params": parameters[1:], "lr": 0.1},
        ],
        momentum=0.9,
    )
    optimizer.found_inf = torch.zeros(())
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad.clone()
    optimizer.step()
    before = [(p.detach().clone(), optimizer.state[p]["momentum_buffer"].clone()) for p in parameters]
    assert all((weight != 1).any() for weight, _ in before)
    optimizer.found_inf.fill_(1)
    for parameter in parameters:
        parameter.grad.fill_(torch.nan)
    optimizer.step()
    for parameter, (weight, momentum) in zip(parameters, before, strict=True):
        assert torch.equal(parameter, weight)
        assert torch.equal(optimizer.state[parameter]["momentum_buffer"], momentum)


@pytest.mark.parametrize("space", [tiny_space(), tiny_space(TINY_MOBILE)], ids=["resnet", "mobilenet"])
def test_only_convolutions_over_several_channels_are_matrices(space):
    settings = tiny_config(train_teacher__optimizer="muon", train_teacher__weight_decay=0.03).train_teacher
    net = random_supernet(space, dtype=torch.float32)
    groups = make_optimizer(dict(net.named_parameters()), settings).param_groups
    found = {id(p): (group["orthogonal"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert len(found) == len(list(net.parameters()))
    for name, parameter in net.named_parameters():
        matrix = parameter.ndim == 4 and parameter.shape[1] > 1
        assert found[id(parameter)] == (matrix, 0.03 if matrix else 0.0), name
