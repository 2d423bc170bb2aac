"""Commands about weights: which there are, how foreign ones come in and ours go out, and what they make of scans."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, Parameter

from voxelstem.cli.triples import spacing_mm
from voxelstem.errors import ConfigError
from voxelstem.terminal import DONE, answer, listed, refused, verdict

Spacing = Literal["ct-stage1", "ct-stage2", "ct-native"]
Eps = Literal["1e-5", "1e-6"]

weights = App(name="weights", help="Bring released weights into our layout, or write ours for other programs.")
importing = App(name="import", help="Read weights of another program, check every tensor, and write a weights folder.")
weights.command(importing)


def models(*, json: bool = False) -> int:
    """List the weights that can be fetched or imported: what they see, their size, licence, data and origin.

    For example:

        voxelstem models

    Args:
        json: Answer in JSON.
    """
    from voxelstem.weights import known

    found = known.models()
    answer(found, known.describe(found), as_json=json)
    return DONE


@dataclass(frozen=True, kw_only=True, slots=True)
class Files:
    """The files in which SPECTRE is released, .pt or .safetensors."""

    backbone: Path
    """The transformer over the patches of a block; or the one file that holds it and the combiner."""
    combiner: Path | None = None
    """The transformer over the blocks of a scan."""
    image_head: Path | None = None
    """The projection of scans into the space that they share with reports."""
    text_head: Path | None = None
    """The projection of reports into that space."""
    text: Path | None = None
    """The reader of reports, with its low-rank changes; kept for later use."""


@importing.command(sort_key=0)
def spectre(
    *,
    files: Annotated[Files, Parameter(name="*")],
    spacing: Spacing = "ct-stage2",
    eps: Eps = "1e-5",
    out: Path,
    json: bool = False,
) -> int:
    """Import SPECTRE's released files. Its weights are licensed CC BY-NC-SA 4.0: not for commercial use.

    For example:

        voxelstem weights import spectre --backbone backbone.pt --combiner combiner.pt --out spectre-large

    Args:
        files: The released files.
        spacing: What a scan is resampled to: 0.75 x 0.75 x 1.5 mm of its second stage, 0.5 x 0.5 x 1 mm of its first,
            or none at all.
        eps: Of the combiner's normalisations: 1e-5 as released, 1e-6 as it was trained.
        out: Weights folder that is written.
        json: Answer in JSON.
    """
    from voxelstem.study import INPUT_SPECS
    from voxelstem.weights.spectre import SpectreFiles, import_spectre

    given = SpectreFiles(
        backbone=files.backbone,
        combiner=files.combiner,
        image_head=files.image_head,
        text_head=files.text_head,
        text=files.text,
    )
    import_spectre(given, out, spec=INPUT_SPECS[spacing], scan_eps=float(eps))
    return _written(out, as_json=json)


@importing.command(sort_key=1)
def i3resnet(files: list[Path], /, *, out: Path, json: bool = False) -> int:
    """Import the chest CT encoder I3ResNet-152 from the parts in which it is distributed.

    For example:

        voxelstem weights import i3resnet part-1 part-2 part-3 --out i3resnet

    Args:
        files: All parts, in any order.
        out: Weights folder that is written.
        json: Answer in JSON.
    """
    from voxelstem.weights.i3resnet import import_i3resnet

    import_i3resnet(files, out)
    return _written(out, as_json=json)


@importing.command(sort_key=2)
def nnssl(
    checkpoint: Path,
    /,
    *,
    out: Path,
    release: str | None = None,
    channels: int = 1,
    encoder_only: bool = False,
    json: bool = False,
) -> int:
    """Import a ResEnc U-Net that nnssl pretrained: OpenMind's, SSL3D's, nnFoundation's, or your own.

    For example:

        voxelstem weights import nnssl checkpoint_final.pth --release openmind-resenc-l-mae --out brain

    Args:
        checkpoint: Its file; `adaptation_plan.json` and README.md are read where they lie beside it.
        out: Weights folder that is written.
        release: The name under which `voxelstem models` lists these weights: their licence, data and origin.
        channels: Make that many inputs of the network's one, for as many contrasts of a scan.
        encoder_only: Take the encoder, and leave out whatever else the file holds.
        json: Answer in JSON.
    """
    from voxelstem.weights.known import known_of
    from voxelstem.weights.nnssl import import_nnssl

    about = known_of(release, family="nnssl") if release else None
    if channels < 1:
        raise ConfigError(f"--channels must be at least 1, got {channels}", hint="leave it out for one contrast")
    import_nnssl(checkpoint, out, about=about, channels=channels, encoder_only=encoder_only)
    return _written(out, as_json=json)


@importing.command(sort_key=3)
def fomo25(checkpoint: Path, /, *, out: Path, json: bool = False) -> int:
    """Import the winner of FOMO25's methods track. No licence is stated; its data forbid commercial use.

    For example:

        voxelstem weights import fomo25 fomo25_mmunetvae_pretrained.ckpt --out fomo

    Args:
        checkpoint: The .ckpt as released. Settings and other objects in it are neither made nor run.
        out: Weights folder that is written.
        json: Answer in JSON.
    """
    from voxelstem.weights.fomo25 import import_fomo25

    import_fomo25(checkpoint, out)
    return _written(out, as_json=json)


@weights.command
def export(
    layout: Literal["spectre", "hub", "onnx", "openvino", "nnssl", "nnunet"],
    folder: Path,
    /,
    *,
    out: Path,
    commercial: bool = False,
    json: bool = False,
) -> int:
    """Write weights, or a finished run of adapt, for other programs; what was written is compared with ours.

    For example:

        voxelstem weights export onnx spectre-large --out spectre-onnx

        voxelstem weights export openvino runs/probe --out probe-openvino

    Args:
        layout: `spectre` (its own names), `hub` (our folder, checked and ready to upload), `onnx` or `openvino` (the
            networks of its levels, with parity.json beside), `nnssl` or `nnunet` (a checkpoint that nnU-Net can
            fine-tune; both words mean the same). Of a run: `hub` (all of it), `onnx` or `openvino` (network and head),
            `nnunet` (a tuned U-Net, for nnU-Net's own predictor).
        folder: Weights folder, or the folder of a run.
        out: Folder that receives the files.
        commercial: Say that the use is commercial: weights whose licence forbids that are refused.
        json: Answer in JSON.
    """
    from voxelstem.card import check_commercial, is_run, read_card

    if commercial:
        check_commercial(read_card(folder / "weights" if is_run(folder) else folder))
    if is_run(folder):
        from voxelstem.handover import export_run

        done = export_run(layout, folder, out)
        answer({"out": str(done)}, str(done), as_json=json)
        return DONE
    match layout:
        case "spectre":
            from voxelstem.weights.spectre import export_spectre as write
        case "hub":
            from voxelstem.weights.hub import export_hub as write
        case "onnx":
            from voxelstem.weights.onnx import export_onnx as write
        case "openvino":
            from voxelstem.weights.openvino import export_openvino as write
        case "nnssl" | "nnunet":
            from voxelstem.weights.nnssl import export_nnssl as write
    done = write(folder, out)
    answer({"out": str(done)}, str(done), as_json=json)
    return DONE


def _written(out: Path, *, as_json: bool) -> int:
    """Say what an import wrote, in the words of `voxelstem show`."""
    from voxelstem.report.words import describe
    from voxelstem.show import show

    facts = show(out)
    answer(facts, f"{describe(facts)}\nin {out}", as_json=as_json)
    return DONE


@dataclass(frozen=True, kw_only=True, slots=True)
class Way:
    """How scans go through the network."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """Number format of the network's arithmetic; embeddings stay float32, and the manifest states the error."""
    tokens: bool = False
    """Keep the patch tokens too; they are large."""
    like_spectre: bool = False
    """Cut the scan to whole blocks about its middle, as spectre-fm does, instead of seeing all of it."""
    spacing: str | None = None
    """Feed at another spacing than the weights ask for: ct-stage1, ct-stage2, ct-native, native, or mm such as
    0.75,0.75,1.5."""
    pool: Literal["cls-mean", "cls", "mean"] = "cls-mean"
    """Describe a block, and the scan, by its cls token, by the mean of its other tokens, or by both."""
    compile: bool = False
    """Let torch compile the network first: it takes minutes and pays for many scans."""
    cluster: str | None = None
    """Address of a Ray cluster that embeds in place of this machine, such as head:6379."""
    commercial: bool = False
    """Say that the use is commercial: weights whose licence forbids that are refused."""
    format: Literal["npz", "fomo"] = "npz"
    """`fomo` also writes ID.npy for FOMO's probes, one vector a scan; the ID is the file's name: mind whose it is."""


def embed(
    sources: list[Path],
    /,
    *,
    weights: str,
    out: Path,
    how: Annotated[Way | None, Parameter(name="*")] = None,
    json: bool = False,
) -> int:
    """Turn scans into embeddings, one .npz each and a manifest.csv. Run again, it skips what is done.

    For example:

        voxelstem embed scans/ --weights runs/first/weights --out embeddings

    Args:
        sources: Scans, DICOM folders, or folders with many of them; or a store.
        weights: Weights folder, a name that `voxelstem models` lists, or hub:owner/name.
        out: Folder of the embeddings.
        how: How scans go through the network.
        json: Answer in JSON.
    """
    from voxelstem import embed as verb
    from voxelstem.embedder import EmbedConfig

    how = how or Way()
    config = EmbedConfig(
        precision=how.precision,
        tokens=how.tokens,
        like_spectre=how.like_spectre,
        spacing=_spacing(how.spacing),
        pool=how.pool,
        compile=how.compile,
        cluster=how.cluster,
        commercial=how.commercial,
        layout=how.format,
    )
    outcome = verb.run(sources, weights=weights, out=out, how=config)
    facts = {"kept": outcome.kept, "skipped": outcome.skipped, "refused": outcome.refused, "out": str(out)}
    facts |= {"warnings": list(outcome.warnings), "refusals": listed(outcome.refusals)}
    lines = refused(outcome.refusals) + [f"warning: {line}" for line in outcome.warnings]
    answer(facts, "\n".join([*lines, f"{outcome.kept} embedded, {outcome.refused} refused, in {out}"]), as_json=json)
    return verdict(outcome.kept, outcome.refused, "give scans of the weights' modality that `voxelstem show` can read")


def _spacing(text: str | None) -> str | tuple[float, float, float] | None:
    """A name of a way to feed, or three lengths."""
    return spacing_mm(text) if text is not None and "," in text else text
