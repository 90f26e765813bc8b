"""Pipelines whose weights stream: the resident ones' images, within the memory given."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from conftest import Pipes
from numpy.typing import NDArray
from snapshots import differences
from streaming_nets import noted, size_of

from autofit import anatomy, probe, techniques
from autofit.spec import Plan, Technique, Workload
from autofit.streaming import engine
from autofit.streaming.parts import SMALL_SHARE, Part, parts
from autofit.techniques.guidance import TwoPasses
from autofit.techniques.memory_format import ChannelsLastDenoiser, ChannelsLastVae
from autofit.techniques.placement import Resident
from autofit.techniques.precision import HalfPrecision
from autofit.techniques.streamed import Streamed
from autofit.trial import generate
from autofit.trial.meter import tracked

pytestmark = pytest.mark.usefixtures("without_gradients")
UNIT_BYTES = 4096  # most layers of the tiny pipelines are larger, so each is a unit
EXACT_CUDA_DB = 60.0  # memory at another address may get another kernel


def images(pipe: Any, width: int = 64, height: int = 64, steps: int = 2) -> NDArray[np.float32]:
    found: NDArray[np.float32] = generate(pipe, Workload(width, height, steps, passes=2), steps)
    return found


def assert_alike(found: NDArray[np.float32], wanted: NDArray[np.float32], device: str) -> None:
    if device == "cpu":
        assert np.array_equal(found, wanted)
        return
    error = float(np.square(found.astype(np.float64) - wanted).mean())
    assert error <= 10 ** (-EXACT_CUDA_DB / 10)


def settled_bytes(pipe: Any) -> int:
    return sum(b.nbytes for m in anatomy.modules(pipe).values() for b in m.buffers())


def run_bytes(pipe: Any) -> int:
    """Of all weights that an image needs: a VAE's encoder is not among them."""
    modules = {**anatomy.modules(pipe), "vae": anatomy.vae(pipe).decoder}
    return sum(size_of(module) for module in modules.values())


@pytest.fixture(scope="session")
def plain(pipes: Pipes) -> Callable[..., NDArray[np.float32]]:
    """The images of a pipe that is resident, made once."""
    made: dict[Any, NDArray[np.float32]] = {}

    def images_of(name: str, device: str, *size: int) -> NDArray[np.float32]:
        if (name, device, size) not in made:
            with Resident().applied(pipes[name], device), torch.no_grad():
                made[name, device, size] = images(pipes[name], *size)
        return made[name, device, size]

    return images_of


@pytest.mark.parametrize("share", [None, 0.5, 0.9, 2.0])
def test_images_are_the_resident_pipes_at_every_residency(
    share: float | None, model: str, pipes: Pipes, device: str, copies: list[int], plain: Any
) -> None:
    pipe = pipes[model]
    wanted = plain(model, device)
    before = noted(pipe, device)
    size_bytes = None if share is None else int(share * run_bytes(pipe)) + settled_bytes(pipe)
    with Streamed(size_bytes, UNIT_BYTES).applied(pipe, device):
        for _ in range(3):
            copies.clear()
            assert_alike(images(pipe), wanted, device)
    assert differences(before, noted(pipe, device)) == []
    # what is not there at the start of an image must come
    assert sum(copies) >= (1 - (0.5 if share is None else share)) * run_bytes(pipe)
    assert (sum(copies) == 0) == (share == 2.0)


@contextmanager
def growth(pipe: Any, device: str) -> Iterator[Callable[[], int]]:
    """Count the bytes that live on the device and did not before, the pipe's weights apart."""
    with tracked(pipe, torch.device(device), None) as tracker:

        def held_bytes() -> int:
            gc.collect()
            return tracker.live_bytes if tracker else torch.cuda.memory_allocated()

        found_bytes = held_bytes()
        gc.freeze()  # what there was is not looked at again: to collect takes no time
        yield lambda: held_bytes() - found_bytes


def test_twenty_calls_of_changing_sizes_do_not_grow(pipes: Pipes, device: str, plain: Any) -> None:
    pipe = pipes["tiny-sd"]
    sizes = [(64, 64, 2), (96, 64, 1), (64, 96, 1), (64, 64, 1)]
    wanted = [plain("tiny-sd", device, *size) for size in sizes]
    held: list[int] = []
    with (
        growth(pipe, device) as grown,
        Streamed(run_bytes(pipe) // 2, UNIT_BYTES).applied(pipe, device),
    ):
        for number in range(20):
            assert_alike(images(pipe, *sizes[number % 4]), wanted[number % 4], device)
            held.append(grown())
    assert held[8:] == held[4:-4]
    assert held[-1] > run_bytes(pipe) / 4  # the pool was seen


@pytest.mark.parametrize(
    ("name", "others"),
    [
        ("tiny-sdxl", (HalfPrecision("float16"),)),  # its VAE is cast to float32 to decode
        ("tiny-flux", (HalfPrecision("bfloat16"),)),
        ("tiny-sd3", (HalfPrecision("float16"), TwoPasses())),
        ("tiny-sd", (ChannelsLastDenoiser(), ChannelsLastVae())),
        ("tiny-sd", (HalfPrecision("float16"), TwoPasses())),  # its VAE streams
    ],
    ids=lambda value: value if isinstance(value, str) else "+".join(t.label for t in value),
)
def test_with_other_techniques(
    name: str, others: tuple[Technique, ...], pipes: Pipes, device: str, copies: list[int]
) -> None:
    pipe = pipes[name]
    with techniques.applied(Plan((*others, Resident())), pipe, device):
        wanted = images(pipe)
    before = noted(pipe, device)
    with techniques.applied(Plan((*others, Streamed(None, UNIT_BYTES))), pipe, device):
        found = [images(pipe)]
        for _ in range(2):
            copies.clear()
            found.append(images(pipe))
    assert differences(before, noted(pipe, device)) == []
    assert sum(copies) > run_bytes(pipe) / 8
    for image in found:
        assert_alike(image, wanted, device)


def test_a_float16_vae_that_is_cast_to_decode_streams_as_it_was_cast(
    pipes: Pipes, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, found = pipes["tiny-sdxl"], list[Part]()
    monkeypatch.setattr(engine, "parts", lambda *asked: found.extend(parts(*asked)) or found)
    half = HalfPrecision("float16")
    with half.applied(pipe, device), Resident().applied(pipe, device):
        wanted = images(pipe)
    with half.applied(pipe, device):
        before = noted(pipe, device)
        with Streamed(None, UNIT_BYTES).applied(pipe, device):
            decoder = next(p for p in found if p.module is pipe.vae.decoder)
            assert {w.dtype for w in decoder.parameters} == {torch.float32}
            for _ in range(3):
                assert_alike(images(pipe), wanted, device)
                assert pipe.vae.dtype == torch.float16  # what the pipe, and its owner, go by
            assert type(pipe.vae) is not diffusers.AutoencoderKL
        assert type(pipe.vae) is diffusers.AutoencoderKL
        assert differences(before, noted(pipe, device)) == []


@pytest.mark.parametrize("share", [0.3, 1.2])
def test_holds_no_more_than_it_was_given(share: float, pipes: Pipes, device: str) -> None:
    pipe = pipes["tiny-sd"]
    size_bytes = int(share * run_bytes(pipe))
    with growth(pipe, device) as grown, Streamed(size_bytes, UNIT_BYTES).applied(pipe, device):
        for _ in range(3):
            images(pipe)
        held_bytes = grown() + (settled_bytes(pipe) if device == "cpu" else 0)
    # the scheduler holds a few kilobytes, and on CUDA each small tensor takes 512 bytes
    assert 0.9 * size_bytes < held_bytes <= size_bytes + 2**16


def storages(weights: Sequence[torch.Tensor]) -> dict[int, int]:
    """Where weights lie: the bytes of each storage."""
    return {s._cdata: s.nbytes() for s in (w.untyped_storage() for w in weights)}


@pytest.mark.parametrize("share", [None, 0.4, 1.2])
@pytest.mark.parametrize("name", ["tiny-sd", "tiny-flux"])
def test_layerwise_casting_does_not_pile_up_weights(
    name: str, share: float | None, device: str
) -> None:
    pipe = Pipes()[name]  # its own: casting cannot be taken back
    denoiser = anatomy.denoiser(pipe)
    denoiser.enable_layerwise_casting(
        storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32
    )
    with Resident().applied(pipe, device):
        wanted = images(pipe)
    before = noted(pipe, device)
    weights = list(denoiser.parameters())
    large = [p for p in weights if p.nbytes > UNIT_BYTES // SMALL_SHARE]
    largest_bytes = max(p.nbytes for m in anatomy.modules(pipe).values() for p in m.parameters())
    size_bytes = None if share is None else int(share * run_bytes(pipe)) + settled_bytes(pipe)
    with Streamed(size_bytes, UNIT_BYTES).applied(pipe, device):
        for _ in range(3):
            assert_alike(images(pipe), wanted, device)
            assert len(storages(large)) == 1  # the pool
        pool_bytes = sum(storages(large).values())
        held_bytes = sum(storages(weights).values())
    assert differences(before, noted(pipe, device)) == []
    assert pool_bytes <= (size_bytes or 2 * largest_bytes)
    assert held_bytes - pool_bytes <= size_of(denoiser) / 1000


def is_mapped(pipe: Any, folder: Path) -> bool:
    """Whether all weights lie in the memory of files in a folder."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    ranges = [line.split()[0].split("-") for line in lines if str(folder) in line]
    spans = [(int(begin, 16), int(end, 16)) for begin, end in ranges]
    weights = [p for m in anatomy.modules(pipe).values() for p in m.parameters()]
    return all(any(b <= p.data_ptr() < e for b, e in spans) for p in weights)


def mapped_bytes(pipe: Any) -> int:
    return sum(c.mapped_bytes for c in probe.facts(pipe).components)


@pytest.mark.parametrize("stays", [False, True])
def test_weights_in_mapped_files_stream(
    stays: bool, pipes: Pipes, device: str, copies: list[int], plain: Any, tmp_path: Path
) -> None:
    """On CUDA small ones are packed, unless they are to stay in the files."""
    pipes["tiny-flux"].save_pretrained(tmp_path)
    pipe = type(pipes["tiny-flux"]).from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    # not the loaded pipe's: mapped weights are aligned to less, and some CPU kernels round by that
    wanted = plain("tiny-flux", device)
    with Resident().applied(pipe, device):
        images(pipe)  # diffusers and transformers leave marks at a first generation
    assert is_mapped(pipe, tmp_path)
    before = noted(pipe, device)
    weight_bytes = sum(size_of(module) for module in anatomy.modules(pipe).values())
    assert mapped_bytes(pipe) == pytest.approx(weight_bytes, rel=0.01)
    with Streamed(None, UNIT_BYTES, from_files=stays).applied(pipe, device):
        for _ in range(3):
            copies.clear()
            assert_alike(images(pipe), wanted, device)
    assert differences(before, noted(pipe, device)) == []
    assert sum(copies) > run_bytes(pipe) / 2
    assert is_mapped(pipe, tmp_path) or not stays
    assert mapped_bytes(pipes["tiny-flux"]) == 0
