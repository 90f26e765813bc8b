from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"

TINY = ("tiny-sd", "tiny-sdxl", "tiny-flux", "tiny-sd3")


def models(*slow: str) -> list[Any]:
    """All, for a test's or a fixture's parameter; where time is short, not the slow ones."""
    return [pytest.param(name, marks=[pytest.mark.slow] * (name in slow)) for name in TINY]


MODELS = models("tiny-sd", "tiny-sd3")  # of the UNets SDXL stands for both, of the DiTs FLUX
# Without a driver, a thousand tests would be made to be skipped.
DRIVERS = [path for path in ("/dev/nvidiactl", "/dev/dxg") if os.path.exists(path)]
DEVICES = ("cpu", *(pytest.param("cuda:0", marks=pytest.mark.gpu) for _ in DRIVERS))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


@pytest.fixture(scope="module", autouse=True)
def _stays() -> None:
    """What imports left stays: half a million objects, which no collection need look through
    again. Every trial and every profile that is reverted collects. The files of tests import more
    and more."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _own_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What autofit caches goes to a folder of the test run; its processes share the dry runs."""
    home, base = tmp_path_factory.mktemp("autofit"), tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "dry-runs"
    shared.mkdir(exist_ok=True)
    (home / "cache").mkdir()
    (home / "cache" / "dryrun").symlink_to(shared)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUTOFIT_HOME", str(home))
        yield


@pytest.fixture(scope="session", params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session", params=MODELS)
def model(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def pipes() -> Pipes:
    return Pipes()


class Pipes:
    """The tiny pipelines, built once. A test that spoils one discards it."""

    def __init__(self) -> None:
        self._built: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        from autofit.architectures import build

        if name not in self._built:
            self._built[name] = build(name)
            # diffusers and transformers leave marks at a first generation
            self._built[name]("a cat", num_inference_steps=1, width=64, height=64)
        return self._built[name]

    def discard(self, name: str) -> None:
        self._built.pop(name, None)


@pytest.fixture
def hears_interrupts() -> Iterator[None]:
    """Python's own handler of Ctrl-C, also where whoever runs the tests has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def without_gradients() -> Iterator[None]:
    import torch

    torch.manual_seed(0)
    with torch.no_grad():
        yield


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of all copies of weights that stream, as they are asked for."""
    from autofit.streaming import engine
    from autofit.streaming.lanes import lane_for

    sizes: list[int] = []

    def counted(device: Any) -> Any:
        lane = lane_for(device)
        found = lane.copy

        def copy_counted(places: Any, sources: Any, after: Any, ready: Any) -> None:
            sizes.append(sum(source.nbytes for source in sources))
            found(places, sources, after, ready)

        lane.copy = copy_counted
        return lane

    monkeypatch.setattr(engine, "lane_for", counted)
    return sizes
