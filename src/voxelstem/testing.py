"""The contracts of plug-ins, for their authors: `check_backbone(make)` and `check_objective(make)` return or raise.

    def test_mine():
        check_objective(lambda: Mine(MineConfig(), ScanVit(ScanVitConfig())))

`make` builds the plug-in anew at each call, small enough for a test, and draws all its weights from torch's
global generator. A broken promise raises AssertionError with one sentence that says which.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from voxelstem.chance import Chance
from voxelstem.protocols import Backbone, Batch, Objective, Tokens

Shape = tuple[int, int, int]
TOLERANCE = 1e-4


def make_batch(size_ijk: Shape = (16, 16, 16), *, samples: int = 4, seed: int = 0) -> Batch:
    """A batch of noise: two `global` views of `size_ijk` a sample, two `local` ones of half its edges, and a text.

    Each sample is a pair too: one `other` view of the global size, with `targets` as `views/pair.py` names them; the
    last sample's other scan is a copy, and of some scans not everything is known. A label map of two values lies under
    the global views.
    """
    generator = torch.Generator().manual_seed(seed)
    half = [max(1, size // 2) for size in size_ijk]
    sizes = {"global": (2, list(size_ijk)), "local": (2, half), "other": (1, list(size_ijk))}
    views = {name: torch.rand(samples, n, 1, *size, generator=generator) for name, (n, size) in sizes.items()}
    places = {
        name: torch.stack([torch.rand(samples, n, 3, generator=generator) * 100, torch.full((samples, n, 3), 80.0)], 2)
        for name, (n, _) in sizes.items()
    }
    places["other"] = places["global"][:, :1]
    views["labels:global"] = (views["global"] > 0.5).float()  # noqa: PLR2004 - half of the voxels
    words = ("left", "right", "upper", "lower", "lung", "kidney", "nodule", "cyst")
    texts = tuple(f"{words[n % len(words)]} {words[(n * n + seed + 1) % len(words)]} {n} mm." for n in range(samples))
    return Batch(views=views, places_mm=places, seed=seed + 3, texts=texts, targets=_make_targets(samples, generator))


def _make_targets(samples: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Facts of pairs of scans, as `views/pair.py` names them."""
    count = torch.arange(samples)
    copy = (count == samples - 1).float()[:, None]
    age = 20 + 60 * torch.rand(samples, 1, generator=generator)
    years = (1 - copy) * torch.rand(samples, 1, generator=generator)
    volumes = torch.randn(samples, 3, generator=generator)
    volumes[0, -1] = math.nan
    contrast = torch.stack([count % 2, (count + 1) % 2], 1).float()
    return {
        "subject": count.float()[:, None],
        "copy": copy,
        "same_session": (years == 0).float(),
        "contrast": torch.where(copy > 0, contrast[:, :1], contrast),
        "years": years,
        "age": torch.cat([age, age + years], 1),
        "volumes": volumes,
        "pathology": (count % 2)[:, None].float(),
    }


def check_backbone(
    make: Callable[[], Any],
    *,
    grid: Shape = (1, 2, 3),
    beyond: Callable[[Any, Tensor], Sequence[Tensor]] | None = None,
) -> None:
    """Hold a backbone to `protocols.Backbone`, on scans of `grid` blocks.

    Every parameter must matter to an embedding. What else a backbone makes of blocks (a decoder's reconstruction)
    comes by `beyond(network, blocks)`; a parameter may matter to that instead.

    Raises:
        AssertionError: it breaks a promise; the message says which.
    """
    network = _drawn(make, 0)
    _require(isinstance(network, Backbone), "it lacks something that protocols.Backbone asks for")
    _check_drawn_by_seed(make)
    _check_state(make)
    _check_groups(network)
    network.eval()
    with torch.no_grad():
        for sizes in ((1, 1, 1), (2, 2, 2), (2, 1, 5)):
            _check_blocks(network, sizes)
        _check_keep(network)
        _check_masked(network)
        _check_levels(network, grid)
    _check_gradients(network, grid, beyond)


def check_objective(make: Callable[[], Any], *, size_ijk: Shape = (16, 16, 16)) -> None:
    """Hold an objective to `protocols.Objective`, on noise in which a global view has `size_ijk` voxels.

    Raises:
        AssertionError: it breaks a promise; the message says which.
    """
    objective = _drawn(make, 0)
    _require(isinstance(objective, nn.Module), "it is no torch module, so it has no state to save")
    _require(isinstance(objective, Objective), "it lacks something that protocols.Objective asks for")
    batch = make_batch(size_ijk)
    _check_drawn_by_seed(make)
    _check_kept(objective)
    _check_step(objective, batch)
    _check_repeats(make, batch)
    _check_resumes(make, batch)
    _check_after_step(make, batch)
    _check_shares(make, batch)


def _require(kept: bool, promise: str) -> None:
    if not kept:
        raise AssertionError(promise)


def _drawn(make: Callable[[], Any], seed: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def _copied(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def _same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def _close(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, atol=TOLERANCE, rtol=TOLERANCE)


def _noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def _check_drawn_by_seed(make: Callable[[], Any]) -> None:
    first = _copied(_drawn(make, 1))
    _require(_same(first, _copied(_drawn(make, 1))), "the same torch seed does not draw the same weights")
    _require(not _same(first, _copied(_drawn(make, 2))), "another torch seed draws the same weights")


def _check_state(make: Callable[[], Any]) -> None:
    one, other = _drawn(make, 1), _drawn(make, 2)
    other.load_state_dict(_copied(one))
    _require(_same(_copied(one), _copied(other)), "its state_dict does not come back the same")
    blocks = _blocks(one, 2)
    with torch.no_grad():
        first, second = (network.eval().encode_blocks(blocks)[0] for network in (one, other))
    _require(torch.equal(first, second), "it keeps state that its state_dict does not hold")


def _check_groups(network: Any) -> None:
    groups = network.param_groups()
    grouped = sorted(id(parameter) for _, members in groups for _, parameter in members)
    _require(
        grouped == sorted(id(parameter) for parameter in network.parameters()),
        "param_groups does not hold every parameter exactly once",
    )
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    _require(
        all(names[id(parameter)] == name for _, members in groups for name, parameter in members),
        "param_groups calls a parameter otherwise than named_parameters does",
    )
    depths = [depth for depth, _ in groups]
    _require(depths == sorted(depths) and depths[0] == 0, "the depths of param_groups do not rise from 0")


def _blocks(network: Any, rows: int, sizes: Shape = (2, 2, 2), *, seed: int = 1) -> Tensor:
    """Noise in blocks that are `sizes` patches long."""
    edges = [patch * count for patch, count in zip(network.patch_ijk, sizes, strict=True)]
    return _noise(rows, 1, *edges, seed=seed)


def _check_blocks(network: Any, sizes: Shape) -> None:
    cls, tokens = network.encode_blocks(_blocks(network, 2, sizes))
    _require(cls.shape == (2, network.dim), f"a block of {sizes} patches gives cls tokens of {tuple(cls.shape)}")
    wanted = (2, sizes[0] * sizes[1] * sizes[2], network.dim)
    _require(tokens.shape == wanted, f"a block of {sizes} patches gives patch tokens of {tuple(tokens.shape)}")
    alone = network.encode_blocks(_blocks(network, 2, sizes)[:1])
    _require(_close(alone[0], cls[:1]) and _close(alone[1], tokens[:1]), "a block's tokens depend on other blocks")


def _hidden(network: Any, blocks: Tensor, patches: Tensor) -> Tensor:
    """The blocks of 2 x 2 x 2 patches with other voxels in the named patches of each row."""
    changed = blocks.clone()
    pi, pj, pk = network.patch_ijk
    for row, numbers in enumerate(patches.tolist()):
        for number in numbers:
            i, j, k = number // 4 * pi, number // 2 % 2 * pj, number % 2 * pk
            changed[row, :, i : i + pi, j : j + pj, k : k + pk] += 0.5
    return changed


def _check_keep(network: Any) -> None:
    blocks, keep = _blocks(network, 2), torch.tensor([[5, 0, 3], [1, 7, 2]])
    rest = torch.tensor([[number for number in range(8) if number not in row] for row in keep.tolist()])
    cls, tokens = network.encode_blocks(blocks, keep=keep)
    _require(tokens.shape == (2, 3, network.dim), "with keep it does not give back one token for each kept patch")
    again = network.encode_blocks(_hidden(network, blocks, rest), keep=keep)
    _require(torch.equal(cls, again[0]) and torch.equal(tokens, again[1]), "patches outside keep enter the network")
    turned = network.encode_blocks(blocks, keep=keep.flip(1))[1]
    _require(_close(turned, tokens.flip(1)), "tokens do not come back in the order of keep")
    everything = torch.arange(8).expand(2, -1)
    whole, plain = network.encode_blocks(blocks, keep=everything), network.encode_blocks(blocks)
    _require(_close(whole[0], plain[0]) and _close(whole[1], plain[1]), "keeping every patch changes the tokens")


def _check_masked(network: Any) -> None:
    blocks, numbers = _blocks(network, 2), torch.tensor([[5, 0], [1, 7]])
    masked = torch.zeros(2, 8, dtype=torch.bool).scatter(1, numbers, value=True)
    plain = network.encode_blocks(blocks)
    none = network.encode_blocks(blocks, masked=torch.zeros_like(masked))
    _require(_close(none[0], plain[0]) and _close(none[1], plain[1]), "masking no patch changes the tokens")
    cls, tokens = network.encode_blocks(blocks, masked=masked)
    _require(tokens.shape == plain[1].shape, "with masked it does not give back one token for every patch")
    again = network.encode_blocks(_hidden(network, blocks, numbers), masked=masked)
    _require(torch.equal(cls, again[0]) and torch.equal(tokens, again[1]), "masked patches are seen by the network")


def _check_levels(network: Any, grid: Shape) -> None:
    n = grid[0] * grid[1] * grid[2]
    blocks = _blocks(network, 2 * n).unflatten(0, (2, n))
    tokens = network.encode(blocks, grid)
    cls, patches = network.encode_blocks(blocks.flatten(0, 1))
    _require(_close(tokens.cls.flatten(0, 1), cls), "encode gives other cls tokens than encode_blocks")
    _require(_close(tokens.patches.flatten(0, 1), patches), "encode gives other patch tokens than encode_blocks")
    if not network.has_scan_level:
        _require(tokens.scan is None and tokens.blocks is None, "it gives scan tokens, and says it has no scan level")
        return
    if tokens.scan is None or tokens.blocks is None:
        raise AssertionError("it says it has a scan level, and gives no scan tokens")
    described = torch.cat([tokens.cls, tokens.patches.mean(dim=2)], dim=-1)
    scan, rows = network.look_at_scan(described, grid)
    _require(scan.ndim == 2 and len(scan) == 2, "the scan level does not give one vector a scan")  # noqa: PLR2004
    _require(rows.shape == (2, n, scan.shape[1]), "the scan level does not give one vector a block")
    _require(_close(scan, tokens.scan) and _close(rows, tokens.blocks), "encode and look_at_scan disagree")
    other = network.look_at_scan(described.roll(1, 1), grid)[0]
    _require(not torch.equal(other, scan), "the scan level does not see where the blocks lie")


def _scalar(tokens: Tokens) -> Tensor:
    """Every number of the tokens with a weight of its own, so that no gradient cancels out."""
    return _weighted([part for part in (tokens.cls, tokens.patches, tokens.blocks, tokens.scan) if part is not None])


def _weighted(parts: Sequence[Tensor]) -> Tensor:
    return torch.stack([(part * _noise(*part.shape, seed=5)).sum() for part in parts]).sum()


def _check_gradients(network: Any, grid: Shape, beyond: Callable[[Any, Tensor], Sequence[Tensor]] | None) -> None:
    n = grid[0] * grid[1] * grid[2]
    masked = torch.zeros(1, n, 8, dtype=torch.bool)
    masked[:, :, ::3] = True
    _scalar(network.encode(_blocks(network, n)[None], grid, masked=masked)).backward()
    if beyond is not None:
        _weighted(beyond(network, _blocks(network, 2))).backward()
    idle = [name for name, parameter in network.named_parameters() if parameter.grad is None]
    _require(not idle, f"no gradient reaches {', '.join(idle)}")


def _trained(objective: Any) -> set[str]:
    """Names of the learner's parameters in the levels that this objective says it trains."""
    learner = objective.learner
    blocks = _blocks(learner, 2)
    cls, patches = learner.encode_blocks(blocks)
    # Drawn through the public door, whatever the parameters are called: what an output depends on is of its level.
    tokens = Tokens(cls=cls[None], patches=patches[None])
    if objective.trains_scan_level:
        tokens = learner.encode(blocks[None], (1, 1, 2))
    members = dict(learner.named_parameters())
    gradients = torch.autograd.grad(_scalar(tokens), list(members.values()), allow_unused=True)
    return {name for name, gradient in zip(members, gradients, strict=True) if gradient is not None}


def _check_kept(objective: Any) -> None:
    learner, kept = objective.learner, objective.backbone
    protocol = all(isinstance(network, Backbone) for network in (learner, kept))
    _require(protocol, "learner or backbone is no Backbone")
    _require(kept.config == learner.config, "the backbone that is kept has another architecture than the learner")
    _require(not objective.trains_scan_level or learner.has_scan_level, "it trains a scan level that is not there")
    _require(_same(_copied(kept), _copied(learner)), "teacher and student differ before the first step")
    if kept is not learner:
        trained = any(parameter.requires_grad for parameter in kept.parameters())
        _require(not trained, "the teacher's parameters ask for gradients")


def _check_step(objective: Any, batch: Batch) -> None:
    views = {name: view.clone() for name, view in batch.views.items()}
    names = _trained(objective)
    output = objective.step(batch, progress=0.1)
    _require(output.loss.ndim == 0 and bool(output.loss.isfinite()), "the loss is not one finite number")
    _require(output.loss.requires_grad, "the loss has no graph")
    _require(all(type(value) is float for value in output.scalars.values()), "a scalar is no float")
    _require(all(torch.equal(views[name], batch.views[name]) for name in views), "a step changes its batch")
    output.loss.backward()
    members = dict(objective.learner.named_parameters())
    idle = sorted(name for name in names if members[name].grad is None or not members[name].grad.abs().sum() > 0)
    _require(not idle, f"no gradient reaches {', '.join(idle)}")
    wild = sorted(
        name for name in members if members[name].grad is not None and not members[name].grad.isfinite().all()
    )
    _require(not wild, f"the gradient is not finite at {', '.join(wild)}")
    if objective.backbone is not objective.learner:
        touched = any(parameter.grad is not None for parameter in objective.backbone.parameters())
        _require(not touched, "a gradient reaches the teacher")


def _check_repeats(make: Callable[[], Any], batch: Batch) -> None:
    losses: list[Tensor] = []
    for noise in (11, 12):
        objective = _drawn(make, 0)
        # Another state of the global generator must not matter: a resumed run has another one.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(noise)
            losses.append(objective.step(batch, progress=0.1).loss)
    _require(torch.equal(losses[0], losses[1]), "the same batch and seed do not give the same loss to the last bit")


def _check_resumes(make: Callable[[], Any], batch: Batch) -> None:
    first, second = _drawn(make, 1), _drawn(make, 2)
    first.step(batch, progress=0.1)
    first.after_step(progress=0.1)
    second.load_state_dict(_copied(first))
    _require(_same(_copied(first), _copied(second)), "its state_dict does not come back the same")
    losses = [objective.step(batch, progress=0.2).loss for objective in (first, second)]
    _require(torch.equal(losses[0], losses[1]), "it keeps state that its state_dict does not hold")


def _check_after_step(make: Callable[[], Any], batch: Batch) -> None:
    objective = _drawn(make, 0)
    learner, before = _copied(objective.learner), _copied(objective)
    objective.step(batch, progress=0.1)
    # A step whose loss is not a number is left out as if it had never been.
    _require(_same(before, _copied(objective)), "step changes the objective's state; only after_step may")
    objective.after_step(progress=0.1)
    _require(_same(learner, _copied(objective.learner)), "step or after_step changes the learner by itself")


def _check_shares(make: Callable[[], Any], batch: Batch) -> None:
    half = len(batch) // 2
    whole = _seen(_drawn(make, 0), [batch])
    shared = _seen(_drawn(make, 0), [batch.part(0, half), batch.part(half, len(batch))])
    # On any number of processes a sample must be looked at alike.
    _require(
        whole == shared,
        "what the learner sees of a sample, is kept from or draws for it depends on how the batch is shared out; "
        "draw from batch.chance, by a sample's own row",
    )


def _seen(objective: Any, batches: list[Batch]) -> list[tuple[bytes, ...]]:
    """What enters the learner's first level, row by row in any order: voxels, what is hidden or kept, and the key."""
    learner = objective.learner
    encode_blocks, rows = learner.encode_blocks, list[tuple[bytes, ...]]()

    def listen(
        blocks: Tensor, *, masked: Tensor | None = None, keep: Tensor | None = None, chance: Chance | None = None
    ) -> Any:
        parts = [blocks, masked, keep, None if chance is None else chance.keys]
        rows.extend(
            tuple(b"" if part is None else part[row].cpu().numpy().tobytes() for part in parts)
            for row in range(len(blocks))
        )
        return encode_blocks(blocks, masked=masked, keep=keep, chance=chance)

    learner.encode_blocks = listen
    with torch.no_grad():
        for batch in batches:
            objective.step(batch, progress=0.1)
    return sorted(rows)
