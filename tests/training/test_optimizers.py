"""Muon for all matrices of a shape at once against torch's, one matrix after the other."""

from __future__ import annotations

import torch

from entropi.training.optimizers import BatchedMuon, orthogonalised

SHAPES = [(24, 24), (24, 96), (96, 24), (24, 24), (96, 24)]


def test_batched_muon_makes_the_updates_of_torchs():
    torch.manual_seed(0)
    initial = [torch.randn(shape) for shape in SHAPES]
    gradients = [[torch.randn(shape) for shape in SHAPES] for _ in range(3)]
    ends = []
    for kind in (torch.optim.Muon, BatchedMuon):
        parameters = [torch.nn.Parameter(x.clone()) for x in initial]
        optimizer = kind(parameters, lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
        for step in gradients:
            for parameter, gradient in zip(parameters, step):
                parameter.grad = gradient.clone()
            optimizer.step()
        ends.append([p.detach() for p in parameters])
    for before, theirs, ours in zip(initial, *ends):
        moved = float((theirs - before).norm())
        assert moved > 0
        assert float((ours - theirs).norm()) < 0.02 * moved  # the iteration is in bfloat16


def test_newton_schulz_brings_singular_values_near_one():
    torch.manual_seed(0)
    matrices = torch.randn(3, 16, 40)
    found = orthogonalised(matrices, (3.4445, -4.7750, 2.0315), 5, 1e-7).float()
    values = torch.linalg.svdvals(found)
    assert float(values.min()) > 0.4
    assert float(values.max()) < 1.4


def test_a_matrix_without_a_gradient_stays():
    parameters = [torch.nn.Parameter(torch.ones(4, 4)) for _ in range(2)]
    parameters[0].grad = torch.ones(4, 4)
    BatchedMuon(parameters, lr=0.1, adjust_lr_fn="match_rms_adamw").step()
    assert not bool((parameters[0] == 1).all())
    assert bool((parameters[1] == 1).all())
