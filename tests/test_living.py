"""A pipe that its owner goes on changing, reading and sharing while a profile is applied."""

from __future__ import annotations

import copy
import functools
import logging
import pickle
import threading
import weakref
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import peft
import pytest
import samples
import torch
from test_streaming_graphs import Tape

import autofit
from autofit import BadInput, Plan, Profile, Workload, anatomy, applied, probe, session
from autofit.architectures import build
from autofit.techniques import KINDS, cuda_graph

HALF, RESIDENT = KINDS["half_precision"]("bfloat16"), KINDS["resident"]()
STREAMED, GRAPH = KINDS["streamed"](), KINDS["cuda_graph"]()
PLANS = {
    "resident": Plan((RESIDENT,)),
    "half": Plan((HALF, RESIDENT)),
    "streamed": Plan((STREAMED,)),
    "half streamed": Plan((HALF, STREAMED)),
    "borrows": Plan((KINDS["streamed"](borrows=True),)),
    "model_offload": Plan((KINDS["model_offload"](),)),
    "group_offload": Plan((KINDS["group_offload"]("leaf"),)),
    "sequential_offload": Plan((KINDS["sequential_offload"](),)),
    "traced": Plan((KINDS["traced"](), RESIDENT)),
    "graph": Plan((GRAPH, RESIDENT)),
    "graph streamed": Plan((GRAPH, STREAMED)),
    "compiled": Plan((KINDS["regional_compile"](), RESIDENT)),
}
PIXELS = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(4))
MASK = (PIXELS[:, :1] > 0.5).float()
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # diffusers' and peft's advice


def each(*names: str, slow: tuple[str, ...] = ()) -> pytest.MarkDecorator:
    marked = [(name, ()) for name in names] + [(name, pytest.mark.slow) for name in slow]
    found = [pytest.param(PLANS[name], id=name, marks=marks) for name, marks in marked]
    return pytest.mark.parametrize("plan", found)


def pairs(
    argument: str, given: dict[Any, tuple[str, ...]], slow: dict[Any, tuple[str, ...]] | None = None
) -> pytest.MarkDecorator:
    """Not all with all: that takes minutes."""
    found = [
        pytest.param(one, PLANS[name], id=f"{getattr(one, '__name__', one)}-{name}", marks=marks)
        for pairing, marks in ((given, ()), (slow or {}, pytest.mark.slow))
        for one, names in pairing.items()
        for name in names
    ]
    return pytest.mark.parametrize(f"{argument}, plan", found)


@pytest.fixture(autouse=True)
def _stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs and compiled code without a device or a compiler."""
    monkeypatch.setattr(Tape, "made", [], raising=False)
    monkeypatch.setattr(cuda_graph, "Capturer", Tape)
    monkeypatch.setattr(cuda_graph.CudaGraph, "why_not", lambda *_: None)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    monkeypatch.setattr(applied, "release", lambda _: None)  # a collection takes 0.3 s


@pytest.fixture
def pipe() -> Any:
    pipe = build("tiny-sd")
    image(pipe, calls=1)  # diffusers and transformers leave marks at a first generation
    return pipe


def fit(pipe: Any, plan: Plan) -> autofit.Applied:
    profile: Profile = samples.profile(
        pipeline=type(pipe).__name__,
        fingerprint=probe.fingerprint(pipe),
        workload=Workload(64, 64, 2, passes=2),
        plan=plan,
        ladder=(),
    )
    return autofit.apply(pipe, profile=profile, device="cpu", verify=False)


def image(pipe: Any, calls: int = 2, **arguments: Any) -> np.ndarray[Any, Any]:
    """The second image: layers that stream have their places by then, and graphs are replayed."""
    given = {"num_inference_steps": 2, "width": 64, "height": 64} | arguments
    for _ in range(calls):
        generator = torch.Generator().manual_seed(1)
        out = pipe("a cat", generator=generator, output_type="np", **given)
    return np.asarray(out.images)


def state(pipe: Any) -> dict[str, Any]:
    """What a pipe is, to be compared with that of another pipe."""
    found: dict[str, Any] = {"class": len(type(pipe).__mro__), "pipe": sorted(vars(pipe))}
    for name, component in pipe.components.items():
        found[name] = type(component).__name__
    for name, module in anatomy.modules(pipe).items():
        for path, part in module.named_modules(prefix=name):
            hooks = len(part._forward_hooks), len(part._forward_pre_hooks)
            processor = type(getattr(part, "processor", None)).__name__
            found[f"{path} part"] = type(part).__name__, sorted(vars(part)), hooks, processor
        for path, tensor in module.state_dict(prefix=f"{name}.").items():
            bits = tensor.contiguous().flatten().view(torch.uint8).numpy()
            found[path] = tensor.dtype, str(tensor.device), zlib.crc32(bits)
    return found


def assert_one_line(error: BadInput) -> None:
    assert "\n" not in str(error)
    assert "revert()" in str(error)


# ---------------------------------------------------------------- changes


@functools.cache
def weights(seed: int) -> dict[str, torch.Tensor]:
    """A LoRA of the UNet's attention and convolutions, and of the text encoder."""
    torch.manual_seed(seed)
    found, pipe = {}, build("tiny-sd")
    for name, part in ("unet", pipe.unet), ("text_encoder", pipe.text_encoder):
        for path, layer in part.named_modules(prefix=name):
            if path.endswith(("to_q", "to_v", "q_proj", "v_proj", ".conv1")):
                shape = layer.weight.shape
                ones = (1,) * len(shape[2:])
                found[f"{path}.lora_A.weight"] = 0.4 * torch.randn(2, *shape[1:])
                found[f"{path}.lora_B.weight"] = 0.4 * torch.randn(shape[0], 2, *ones)
    return found


def load(pipe: Any, name: str = "a", seed: int = 0) -> None:
    pipe.load_lora_weights(dict(weights(seed)), adapter_name=name)


def load_into_unet(pipe: Any) -> None:
    found = {n.removeprefix("unet."): w for n, w in weights(0).items() if n.startswith("unet.")}
    pipe.unet.load_lora_adapter(found, prefix=None, adapter_name="a")


def inject(pipe: Any) -> None:
    """By peft itself: nothing of the pipe is asked."""
    torch.manual_seed(3)
    config = peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, pipe.unet)


def scale(pipe: Any) -> None:
    for part in pipe.unet.modules():
        if isinstance(getattr(part, "scaling", None), dict):
            part.scaling = {name: 2 * value for name, value in part.scaling.items()}


@functools.cache
def other() -> Any:
    """Components of the same shapes with other weights."""
    pipe = build("tiny-sd")
    torch.manual_seed(9)
    with torch.no_grad():
        for module in anatomy.modules(pipe).values():
            for parameter in module.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return pipe


def swap(name: str) -> Callable[[Any], None]:
    return lambda pipe: setattr(pipe, name, copy.deepcopy(getattr(other(), name)))


def euler(pipe: Any) -> None:
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)


class Processor:
    def __init__(self, found: Any) -> None:
        self.found = found

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        out: torch.Tensor = 1.5 * self.found(*args, **kwargs)
        return out


def processors_set(pipe: Any) -> None:
    found = pipe.unet.attn_processors
    pipe.unet.set_attn_processor({name: Processor(p) for name, p in found.items()})


def processor_assigned(pipe: Any) -> None:
    layer = next(m for m in pipe.unet.modules() if hasattr(m, "processor"))
    layer.processor = Processor(layer.processor)


def hooked(pipe: Any) -> None:
    pipe.unet.mid_block.resnets[0].register_forward_hook(lambda *given: 1.25 * given[-1])


CHANGES: dict[str, tuple[Callable[[Any], Any], ...]] = {
    "a LoRA": (
        load,
        lambda pipe: pipe.set_adapters("a", 0.4),
        lambda pipe: pipe.fuse_lora(lora_scale=0.7),
        lambda pipe: pipe.unfuse_lora(),
        lambda pipe: pipe.disable_lora(),
        lambda pipe: load(pipe, "b", 5),
        lambda pipe: pipe.delete_adapters("b"),
        lambda pipe: pipe.unload_lora_weights(),
    ),
    "a LoRA of the UNet": (
        load_into_unet,
        lambda pipe: pipe.unet.set_adapters("a", 0.4),
        scale,
        lambda pipe: pipe.unet.fuse_lora(),
        lambda pipe: pipe.unet.unload_lora(),
    ),
    "components": (
        euler,
        swap("unet"),
        swap("vae"),
        swap("text_encoder"),
        lambda pipe: pipe.register_modules(unet=copy.deepcopy(other().unet)),
        lambda pipe: pipe.unet.load_state_dict(build("tiny-sd").unet.state_dict()),
    ),
    "settings": (
        processors_set,
        processor_assigned,
        lambda pipe: pipe.enable_freeu(0.5, 0.4, 1.5, 1.6),
        lambda pipe: pipe.disable_freeu(),
        lambda pipe: pipe.vae.enable_slicing(),
        hooked,
    ),
}


def check_changes(changes: tuple[Callable[[Any], Any], ...], plan: Plan, pipe: Any) -> None:
    """As if the profile were applied after them; ``revert()`` leaves the changes, and no more."""
    twin = build("tiny-sd")
    image(twin, calls=1)
    with fit(pipe, plan):
        image(pipe)
        for change in changes:
            change(pipe)
            change(twin)
            with fit(twin, plan) if HALF in plan.techniques else nullcontext():
                wanted = image(twin, calls=1)
            assert np.array_equal(image(pipe), wanted)
    assert state(pipe) == state(twin)
    assert np.array_equal(image(pipe, calls=1), image(twin, calls=1))


@pairs(
    "changes",
    {
        "a LoRA": ("sequential_offload",),
        "a LoRA of the UNet": ("graph streamed",),
        "components": ("graph",),
        "settings": ("streamed", "group_offload"),
    },
    slow={"a LoRA": ("borrows",), "components": ("half",)},
)
def test_a_change_while_applied_comes_to_what_it_does_without(
    changes: str, plan: Plan, pipe: Any
) -> None:
    check_changes(CHANGES[changes], plan, pipe)


@each("half streamed", "model_offload")
def test_weights_may_be_written_with_the_plan_off(plan: Plan, pipe: Any) -> None:
    twin = build("tiny-sd")
    image(twin, calls=1)
    with fit(pipe, plan) as found:
        with found.suspended(), torch.no_grad():
            pipe.unet.conv_in.weight.mul_(1.5)
        with torch.no_grad():
            twin.unet.conv_in.weight.mul_(1.5)
        with fit(twin, plan):
            wanted = image(twin)
        assert np.array_equal(image(pipe), wanted)
    assert state(pipe) == state(twin)


@each("streamed", "traced", "graph", slow=("compiled",))
def test_adapters_that_peft_itself_puts_in_are_seen(plan: Plan, pipe: Any) -> None:
    check_changes((inject, scale), plan, pipe)


@each("half", "graph streamed")
def test_a_lora_is_scaled_in_the_middle_of_a_call(plan: Plan, pipe: Any) -> None:
    def fade(pipe: Any, step: int, _: Any, tensors: Any) -> Any:
        pipe.set_adapters("a", 1.0 if step else 0.1)
        return tensors

    load(pipe)
    faded = {"num_inference_steps": 3, "callback_on_step_end": fade}
    wanted, before = image(pipe, **faded), state(pipe)
    with fit(pipe, plan):
        plain = image(pipe, num_inference_steps=3)
        found = image(pipe, **faded)
        assert np.array_equal(image(pipe, num_inference_steps=3), plain)
    assert not np.array_equal(found, plain)
    assert np.array_equal(found, wanted) or HALF in plan.techniques
    assert state(pipe) == before


@each("streamed", "sequential_offload", "traced", "graph")
def test_a_hook_is_called_whenever_it_was_set(
    plan: Plan, pipe: Any, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[str] = []

    def heard() -> list[str]:
        calls.clear()
        pipe("a cat", num_inference_steps=3, width=64, height=64)
        return list(calls)

    early = pipe.unet.conv_in.register_forward_pre_hook(lambda *_: calls.append("early"))
    with caplog.at_level(logging.WARNING, "autofit"), fit(pipe, plan):
        heard()
        assert heard() == ["early"] * 3
        late = pipe.unet.mid_block.register_forward_hook(lambda *_: calls.append("late"))
        pipe.vae.decoder.register_forward_hook(lambda *_: calls.append("decoded"))
        for _ in range(2):
            assert heard() == [*["early", "late"] * 3, "decoded"]
        early.remove()
        late.remove()
        assert heard() == ["decoded"]
    assert heard() == ["decoded"]
    replays = any(t.name in ("traced", "cuda_graph") for t in plan.techniques)
    said = [r.getMessage() for r in caplog.records if "forward hook" in r.getMessage()]
    assert len(said) == (2 if replays else 0)
    assert all(text.startswith("UNet2DConditionModel.conv_in has a") for text in said)


def test_a_change_that_fails_changes_nothing(pipe: Any) -> None:
    before = state(pipe)
    with fit(pipe, PLANS["streamed"]):
        wanted = image(pipe)
        with pytest.raises(ValueError, match="Invalid LoRA"):
            pipe.load_lora_weights({"unet.nonsense": torch.ones(1)})
        assert np.array_equal(image(pipe), wanted)
    assert state(pipe) == before


def test_what_no_plan_can_be_applied_to_is_said_and_put_right_by_revert(pipe: Any) -> None:
    before, unet = state(pipe), pipe.unet
    found = fit(pipe, PLANS["half"])
    with pytest.raises(BadInput, match="its profile cannot be applied to what it is now") as error:
        pipe.unet = None
    assert_one_line(error.value)
    with pytest.raises(BadInput):
        image(pipe)
    found.revert()
    pipe.unet = unet
    assert state(pipe) == before


# ---------------------------------------------------------------- what is refused


def second(pipe: Any) -> Any:
    return diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipe)


REFUSED: dict[str, Callable[[Any], Any]] = {
    "offload": lambda pipe: pipe.enable_sequential_cpu_offload(device="cpu"),
    "group offload": lambda pipe: pipe.enable_group_offload(torch.device("cpu")),
    "cast": lambda pipe: pipe.to(torch.float16),
    "cast a part": lambda pipe: pipe.vae.half(),
    "move": lambda pipe: pipe.to("meta"),
    "move a part": lambda pipe: pipe.text_encoder.to("meta"),
    "compile": lambda pipe: pipe.unet.compile(),
    "compiled": lambda pipe: setattr(pipe, "unet", torch.compile(other().unet)),
    "layerwise casting": lambda pipe: pipe.unet.enable_layerwise_casting(torch.float16),
    "copy": copy.deepcopy,
    "copy a part": lambda pipe: copy.deepcopy(pipe.unet),
    "pickle": pickle.dumps,
    "pickle a part": lambda pipe: pickle.dumps(pipe.unet),
    "apply again": lambda pipe: fit(pipe, PLANS["resident"]),
    "apply to a pipe of its parts": lambda pipe: fit(second(pipe), PLANS["resident"]),
}


@each("resident", "streamed", "sequential_offload", "model_offload")
def test_what_would_take_its_weights_away_is_refused_in_one_line(plan: Plan, pipe: Any) -> None:
    before, wanted = state(pipe), image(pipe, calls=1)
    with fit(pipe, plan):
        for name, ask in REFUSED.items():
            if plan == PLANS["model_offload"] and name.startswith("move"):
                continue  # its hooks move components all the time
            with pytest.raises(BadInput) as error:
                ask(pipe)
            assert_one_line(error.value)
        assert np.array_equal(image(pipe), wanted)
    assert state(pipe) == before


def test_a_pipe_that_is_compiled_is_refused_in_one_line(pipe: Any) -> None:
    pipe.unet = torch.compile(pipe.unet)
    with pytest.raises(BadInput, match=r"give the pipe the module itself \(pipe.unet._orig_mod\)"):
        fit(pipe, PLANS["resident"])


@each("half", "streamed", "sequential_offload", "model_offload")
def test_where_it_is_already_it_may_be_asked_to_go(plan: Plan, pipe: Any) -> None:
    before = state(pipe)
    with fit(pipe, plan):
        wanted = image(pipe)
        assert pipe.to("cpu") is pipe
        pipe.unet.to("cpu")
        pipe.to(torch.float32)
        assert np.array_equal(image(pipe), wanted)
    assert state(pipe) == before


# ---------------------------------------------------------------- what is read


def saved(pipe: Any, folder: Path) -> dict[str, Any]:
    pipe.save_pretrained(folder)
    found = diffusers.DiffusionPipeline.from_pretrained(folder)
    return {name: module.state_dict() for name, module in anatomy.modules(found).items()}


def saved_part(pipe: Any, folder: Path) -> dict[str, Any]:
    pipe.unet.save_pretrained(folder)
    return {"unet": type(pipe.unet).from_pretrained(folder).state_dict()}


def states(pipe: Any, _: Path) -> dict[str, Any]:
    return {name: module.state_dict() for name, module in anatomy.modules(pipe).items()}


@each("half", "half streamed", "group_offload", "sequential_offload", "model_offload")
def test_the_weights_that_are_read_are_the_real_ones(plan: Plan, pipe: Any, tmp_path: Path) -> None:
    before = state(pipe)
    wanted = {name: copy.deepcopy(m.state_dict()) for name, m in anatomy.modules(pipe).items()}
    with fit(pipe, plan):
        picture = image(pipe)
        for read in saved, saved_part, states:
            for name, found in read(pipe, tmp_path / read.__name__).items():
                assert found.keys() == wanted[name].keys()
                assert all(torch.equal(found[n], wanted[name][n]) for n in found)
        assert np.array_equal(image(pipe), picture)
    assert state(pipe) == before


@each("borrows", "graph streamed", "half streamed", "sequential_offload")
def test_a_single_layer_that_streams_reads_as_it_is(plan: Plan, pipe: Any) -> None:
    parts = pipe.unet.mid_block, pipe.vae.decoder, pipe.text_encoder.encoder
    dtype = torch.bfloat16 if HALF in plan.techniques else torch.float32
    wanted = [copy.deepcopy(part.state_dict()) for part in parts]
    with fit(pipe, plan):
        for _ in range(2):
            for part, real in zip(parts, wanted, strict=True):
                found = part.state_dict()
                assert all(torch.equal(found[n], real[n].to(dtype)) for n in real)
            image(pipe)


# ---------------------------------------------------------------- pipes of its parts


def img2img(pipe: Any) -> Any:
    return second(pipe).to("cpu"), {"image": PIXELS}


def inpaint(pipe: Any) -> Any:
    found = diffusers.AutoPipelineForInpainting.from_pipe(pipe)
    return found, {"image": PIXELS, "mask_image": MASK}


def controlled(pipe: Any) -> Any:
    torch.manual_seed(2)
    net = diffusers.ControlNetModel.from_unet(pipe.unet)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    parts = {**pipe.components, "controlnet": net.to(pipe.unet.dtype)}
    found = diffusers.StableDiffusionControlNetPipeline(**parts, requires_safety_checker=False)
    return found, {"image": PIXELS}


@pairs(
    "made",
    {
        img2img: ("graph streamed", "model_offload"),
        inpaint: ("borrows", "traced"),
        controlled: ("half streamed", "sequential_offload"),
    },
)
def test_a_pipe_of_its_parts_may_be_made_at_any_time(made: Any, plan: Plan, pipe: Any) -> None:
    before, (early, arguments) = state(pipe), made(pipe)
    arguments["num_inference_steps"] = 4
    plain = image(early, calls=1, **arguments)
    with fit(pipe, plan):
        wanted = image(pipe)
        late, _ = made(pipe)
        found = image(late, **arguments)
        assert np.array_equal(image(pipe), wanted)
        if HALF not in plan.techniques:  # a ControlNet of one's own is not cast
            assert np.array_equal(found, plain)
            assert np.array_equal(image(early, **arguments), plain)
    assert np.isfinite(found).all()
    assert state(pipe) == before
    assert np.array_equal(image(early, calls=1, **arguments), plain)


@pytest.mark.parametrize(
    "loaded", [torch.float16, pytest.param(torch.float32, marks=pytest.mark.slow)]
)
def test_a_vae_that_is_cast_to_decode_is_shared_too(loaded: torch.dtype) -> None:
    """It is held in float32, and to other pipes what its owner or the profile has made of it."""
    pipe = build("tiny-sdxl")
    pipe.to(dtype=loaded)
    image(pipe, calls=1)
    half = () if loaded is torch.float16 else (KINDS["half_precision"]("float16"),)
    before = state(pipe)
    with fit(pipe, Plan((*half, RESIDENT))):
        wanted = image(pipe)
    with fit(pipe, Plan((*half, STREAMED))):
        assert np.array_equal(image(pipe), wanted)
        made = diffusers.StableDiffusionXLImg2ImgPipeline.from_pipe(pipe, torch_dtype=torch.float16)
        assert np.isfinite(image(made, image=PIXELS, num_inference_steps=4)).all()
        assert np.array_equal(image(pipe), wanted)
        with pytest.raises(BadInput) as error:
            pipe.vae.to(torch.bfloat16)
        assert_one_line(error.value)
        assert np.array_equal(image(pipe), wanted)
    assert state(pipe) == before


@pairs(
    "made", {img2img: ("graph streamed",), inpaint: ("model_offload",), controlled: ("borrows",)}
)
def test_a_pipe_that_is_given_an_image_may_have_the_profile(
    made: Any, plan: Plan, pipe: Any
) -> None:
    given, arguments = made(pipe)
    arguments["num_inference_steps"] = 4
    plain = image(given, calls=1, **arguments)
    before = state(given)
    with fit(given, plan):
        assert np.array_equal(image(given, **arguments), plain)
    assert state(given) == before
    with pytest.raises(BadInput, match="needs an image, which trials do not have"):
        autofit.apply(given, budget="4GB", size=(64, 64), device="cpu")


# ---------------------------------------------------------------- at once


@each("resident", "streamed")
def test_a_pipe_that_is_gone_caps_nothing(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody reverted it; another one is not to run within its budget."""
    caps: list[str] = []

    @contextmanager
    def capped(*_: Any, **__: Any) -> Iterator[Callable[[], None]]:
        caps.append("on")
        try:
            yield lambda: None
        finally:
            caps.append("off")

    monkeypatch.setattr(applied, "capped", capped)
    pipe = build("tiny-sd")
    fit(pipe, plan)
    image(pipe, calls=1)
    unet = weakref.ref(pipe.unet)
    assert caps == ["on"]
    del pipe
    assert applied.applied_on(torch.device("cpu")) == []
    assert unet() is None
    assert caps == ["on", "off"]


@each("streamed", "graph", "model_offload")
def test_threads_that_call_one_pipe_wait_for_each_other(plan: Plan, pipe: Any) -> None:
    found: list[Any] = []
    with fit(pipe, plan):
        wanted = image(pipe)
        threads = [threading.Thread(target=lambda: found.append(image(pipe))) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 3
    assert all(np.array_equal(one, wanted) for one in found)


def test_a_call_that_waited_while_the_profile_was_reverted_runs_without(pipe: Any) -> None:
    before, wanted, found = state(pipe), image(pipe), list[Any]()
    fitted = fit(pipe, PLANS["streamed"])
    call = pipe.__call__  # what the thread would be in
    with fitted.lock:
        waiting = threading.Thread(target=lambda: found.append(call("a cat", **{
            "num_inference_steps": 2, "width": 64, "height": 64, "output_type": "np",
            "generator": torch.Generator().manual_seed(1)})))  # fmt: skip
        waiting.start()
        fitted.revert()
    waiting.join()
    assert np.array_equal(np.asarray(found[0].images), wanted)
    assert not fitted.is_applied
    assert state(pipe) == before


def test_two_pipes_have_a_profile_each(pipe: Any) -> None:
    twin = copy.deepcopy(other())
    image(twin, calls=1)
    before, wanted = (state(pipe), state(twin)), (image(pipe), image(twin))
    first = fit(pipe, PLANS["streamed"])
    with session.measuring(twin, "cpu"):  # a trial has the card for itself
        assert not first.is_applied
    second = fit(twin, PLANS["borrows"])
    for _ in range(2):
        assert np.array_equal(image(pipe), wanted[0])
        assert np.array_equal(image(twin), wanted[1])
    first.revert()
    assert np.array_equal(image(twin), wanted[1])
    second.revert()
    assert (state(pipe), state(twin)) == before
