"""Prompts that come again: what is not encoded again, and what is."""

from __future__ import annotations

import copy
import functools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import samples
import torch
from conftest import Pipes
from snapshots import differences, snapshot
from torch import nn

import autofit
from autofit import Plan, Profile, Workload, anatomy, probe, prompts
from autofit.architectures import build
from autofit.spec import Measurement, Rung
from autofit.techniques import KINDS
from autofit.trial import InProcess, Request

RESIDENT, SLICED = KINDS["resident"](), KINDS["sliced_vae"]()
GROUPS = KINDS["group_offload"]()
PLACEMENTS = [
    RESIDENT,
    KINDS["model_offload"](),
    pytest.param(KINDS["sequential_offload"](), marks=pytest.mark.slow),
    GROUPS,
    KINDS["streamed"](),
]


class Forwards:
    """Forwards of the text encoders, counted."""

    def __init__(self, pipe: Any) -> None:
        self.pipe, self.number = pipe, 0

    def __enter__(self) -> Forwards:
        encoders = [m for n, m in anatomy.modules(self.pipe).items() if "encoder" in n]
        self._hooks = [m.register_forward_pre_hook(self._count) for m in encoders]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _count(self, *_: Any) -> None:
        self.number += 1

    def of(self, call: Callable[[], Any]) -> int:
        before = self.number
        call()
        return self.number - before


def profile_of(pipe: Any, plan: Plan, *ladder: Plan) -> Profile:
    return samples.profile(
        pipeline=type(pipe).__name__,
        fingerprint=probe.fingerprint(pipe),
        workload=Workload(64, 64, 2, passes=2),
        plan=plan,
        ladder=tuple(Rung(rung, samples.measurement()) for rung in ladder),
    )


def fit(pipe: Any, plan: Plan, device: str = "cpu", **options: Any) -> autofit.Applied:
    profile = profile_of(pipe, plan)
    # On a card that others use the budget of this profile may be spent already.
    options = {"enforce": device == "cpu", **options}
    return autofit.apply(pipe, profile=profile, device=device, verify=False, **options)


def image(pipe: Any, prompt: Any = "a cat", **changes: Any) -> np.ndarray[Any, Any]:
    asked = {"num_inference_steps": 2, "width": 64, "height": 64, "guidance_scale": 5.0}
    seeded = torch.Generator().manual_seed(0)
    out = pipe(prompt, **(asked | changes), generator=seeded, output_type="np")
    return np.asarray(out.images)


@contextmanager
def cached(pipe: Any) -> Iterator[Forwards]:
    """The pipe with its prompts kept, and without gradients."""
    with torch.no_grad(), Forwards(pipe) as forwards, prompts.cached(pipe):
        yield forwards


@pytest.fixture
def pipe() -> Any:
    """One to spoil."""
    return build("tiny-sd")


def encode(pipe: Any, prompt: Any = "a cat", **changes: Any) -> Any:
    asked = {"device": torch.device("cpu"), "num_images_per_prompt": 1}
    return pipe.encode_prompt(prompt, **(asked | {"do_classifier_free_guidance": True} | changes))


def uncached(pipe: Any, prompt: Any = "a cat", **changes: Any) -> Any:
    found = SimpleNamespace(encode_prompt=type(pipe).encode_prompt.__get__(pipe))
    return encode(found, prompt, **changes)


def same(first: Any, second: Any) -> bool:
    return all(map(torch.equal, first, second))


# ---------------------------------------------------------------- with a profile applied


@pytest.mark.parametrize("placement", PLACEMENTS, ids=lambda p: p.name)
def test_a_prompt_that_comes_again_is_not_encoded_again(
    placement: Any, model: str, device: str, pipes: Pipes
) -> None:
    pipe = pipes[model]
    before, plan = snapshot(pipe, memory=False), Plan((placement,))
    with fit(pipe, plan, device, cache_prompts=False), Forwards(pipe) as forwards:
        wanted, other = image(pipe), image(pipe, "a dog")
        assert forwards.of(lambda: image(pipe)) > 0
    with fit(pipe, plan, device), Forwards(pipe) as forwards:
        assert np.array_equal(image(pipe), wanted)
        encoded = forwards.number
        assert encoded > 0
        for _ in range(3):
            assert np.array_equal(image(pipe), wanted)
        assert forwards.number == encoded
        assert np.array_equal(image(pipe, "a dog"), other)
        assert forwards.number == 2 * encoded
    assert not np.array_equal(wanted, other)
    assert "encode_prompt" not in vars(pipe)
    assert differences(before, snapshot(pipe, memory=False)) == []


def test_text_encoders_that_stream_do_not_move_again(pipes: Pipes, copies: list[int]) -> None:
    pipe = pipes["tiny-sdxl"]

    def moved_bytes(**options: Any) -> int:
        with fit(pipe, Plan((KINDS["streamed"](),)), **options):
            for _ in range(3):
                image(pipe)
            copies.clear()
            image(pipe)
            return sum(copies)

    encoders = (pipe.text_encoder, pipe.text_encoder_2)
    largest_bytes = max(p.nbytes for m in encoders for p in m.parameters())
    assert moved_bytes() <= moved_bytes(cache_prompts=False) - largest_bytes


def test_trials_measure_the_encoding(pipes: Pipes) -> None:
    pipe = pipes["tiny-sd"]
    workload = Workload(64, 64, 2, passes=2)
    measurer = InProcess(pipe, "cpu")
    for full in (False, True):
        with Forwards(pipe) as forwards:
            request = Request(Plan((RESIDENT,)), workload, None, full=full)
            outcome = measurer.measure(request)
        assert isinstance(outcome, Measurement)
        generations = forwards.number / 2  # the prompt and the negative prompt
        assert generations >= 3  # what is tracked, what warms up, what is measured


def test_a_step_down_encodes_anew(pipes: Pipes) -> None:
    """By the plan that it comes to."""
    pipe = pipes["tiny-sd"]
    profile = profile_of(pipe, Plan((RESIDENT,)), Plan((SLICED, RESIDENT)))
    fitted = autofit.apply(pipe, profile=profile, device="cpu", verify=False)
    with fitted, Forwards(pipe) as forwards:
        wanted = image(pipe)
        fitted.step_down("out of memory")
        assert forwards.of(lambda: image(pipe)) > 0
        assert forwards.of(lambda: image(pipe)) == 0
        assert np.array_equal(image(pipe), wanted)


@pytest.mark.gpu
def test_what_is_kept_takes_no_memory_of_the_device(pipes: Pipes) -> None:
    pipe = pipes["tiny-flux"]
    with fit(pipe, Plan((RESIDENT,)), "cuda:0"):
        image(pipe)
        before_bytes = torch.cuda.memory_allocated()
        for number in range(8):
            image(pipe, f"a cat, {number}")
        assert torch.cuda.memory_allocated() <= before_bytes


# ---------------------------------------------------------------- which calls are the same


@pytest.mark.parametrize(
    ("model", "changes"),
    [
        ("tiny-sd", {"prompt": "a dog"}),
        ("tiny-sd", {"prompt": ["a cat"]}),
        ("tiny-sd", {"prompt": ["a cat", "a dog"]}),
        ("tiny-sd", {"negative_prompt": "blurred"}),
        ("tiny-sd", {"num_images_per_prompt": 2}),
        ("tiny-sd", {"guidance_scale": 1.0}),
        ("tiny-sdxl", {"clip_skip": 1}),
        ("tiny-sdxl", {"prompt_2": "a dog"}),
        ("tiny-sdxl", {"negative_prompt_2": "blurred"}),
        ("tiny-flux", {"prompt_2": "a dog"}),
        ("tiny-flux", {"max_sequence_length": 16}),
        ("tiny-sd3", {"prompt_3": "a dog"}),
        ("tiny-sd3", {"max_sequence_length": 16}),
    ],
    ids=str,
)
def test_another_argument_is_another_encoding(
    model: str, changes: dict[str, Any], pipes: Pipes
) -> None:
    pipe = pipes[model]
    wanted = image(pipe, **({"prompt": "a cat"} | changes))
    with cached(pipe) as forwards:
        plain = image(pipe)
        assert forwards.of(lambda: image(pipe, **({"prompt": "a cat"} | changes))) > 0
        for _ in range(2):
            assert np.array_equal(image(pipe, **({"prompt": "a cat"} | changes)), wanted)
        assert forwards.of(lambda: image(pipe)) == 0
        assert np.array_equal(image(pipe), plain)


def test_what_the_encoders_do_not_see_is_no_other_encoding(pipes: Pipes) -> None:
    pipe = pipes["tiny-sd"]
    with cached(pipe) as forwards:
        image(pipe)
        for changes in ({"guidance_scale": 7.0}, {"num_inference_steps": 3}, {"width": 128}):
            assert forwards.of(lambda c=changes: image(pipe, **c)) == 0


def test_a_second_prompt_for_guidance_is_kept_too(pipes: Pipes) -> None:
    """FLUX encodes it by a call of its own."""
    pipe = pipes["tiny-flux"]
    asked = {"negative_prompt": "blurred", "true_cfg_scale": 3.0}
    wanted = image(pipe, **asked)
    with cached(pipe) as forwards:
        image(pipe, **asked)
        assert forwards.of(lambda: image(pipe, **asked)) == 0
        assert np.array_equal(image(pipe, **asked), wanted)


def test_arguments_by_place_or_by_name_are_the_same(pipe: Any) -> None:
    with cached(pipe) as forwards:
        first = encode(pipe)
        again = pipe.encode_prompt("a cat", torch.device("cpu"), 1, True, None, clip_skip=None)
        assert forwards.number == 2
        assert same(first, again)


def test_tensors_that_are_given_are_not_compared(pipe: Any) -> None:
    with cached(pipe) as forwards:
        embeds = encode(pipe)[0]
        for scale in (1.0, 2.0):
            given = {"prompt": None, "prompt_embeds": scale * embeds}
            assert forwards.of(lambda g=given: encode(pipe, **g)) == 1  # the empty negative prompt
            assert torch.equal(encode(pipe, **given)[0], scale * embeds)


def test_bad_arguments_are_the_pipes_to_tell(pipe: Any) -> None:
    with cached(pipe):
        with pytest.raises(TypeError, match="unheard_of"):
            encode(pipe, unheard_of=1)
        with pytest.raises(TypeError, match="same type"):
            encode(pipe, negative_prompt=["blurred"])


def test_gradients_and_autocast_are_not_served_from_what_is_kept(pipe: Any) -> None:
    with cached(pipe) as forwards:
        encode(pipe)
        with torch.enable_grad():
            assert encode(pipe)[0].requires_grad
        with torch.autocast("cpu", torch.bfloat16):
            assert not torch.equal(encode(pipe)[0], encode(build("tiny-sd"))[0].bfloat16())
        assert forwards.number == 6


def test_inference_mode_may_come_and_go(pipe: Any) -> None:
    with cached(pipe) as forwards:
        with torch.inference_mode():
            first = encode(pipe)
        again = encode(pipe)
        assert forwards.number == 2
        assert same(first, again)
        assert not again[0].is_inference()


# ---------------------------------------------------------------- what it goes by


class Adapter(nn.Module):
    """As peft's: in the place of a layer, which it has inside."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.Linear(base_layer.in_features, 2, bias=False)
        self.lora_B = nn.Linear(2, base_layer.out_features, bias=False)
        self.scaling, self.merged_adapters = {"default": 4.0}, list[str]()
        self._disable_adapters = False

    @property
    def delta(self) -> torch.Tensor:
        return self.scaling["default"] * self.lora_B.weight @ self.lora_A.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        off = self._disable_adapters or self.merged_adapters
        return self.base_layer(x) if off else self.base_layer(x) + x @ self.delta.T

    def merge(self) -> None:
        self.base_layer.weight.data += self.delta
        self.merged_adapters.append("default")


def attention(pipe: Any) -> Any:
    return pipe.text_encoder.encoder.layers[0].self_attn


def loaded(pipe: Any) -> Adapter:
    torch.manual_seed(1)
    adapter = attention(pipe).v_proj = Adapter(attention(pipe).v_proj)
    return adapter


def unloaded(pipe: Any) -> None:
    attention(pipe).v_proj = attention(pipe).v_proj.base_layer


def load(pipe: Any) -> None:
    loaded(pipe)


def load_fuse_and_unload(pipe: Any) -> None:
    loaded(pipe).merge()
    unloaded(pipe)


def other_weights(pipe: Any) -> dict[str, torch.Tensor]:
    return {n: 1.5 * t for n, t in pipe.text_encoder.state_dict().items() if "ids" not in n}


def load_state(pipe: Any) -> None:
    pipe.text_encoder.load_state_dict(other_weights(pipe), strict=False)


def write_through_data(pipe: Any) -> None:
    for name, tensor in other_weights(pipe).items():
        pipe.text_encoder.get_parameter(name).data.copy_(tensor)


def set_data(pipe: Any) -> None:
    weight = attention(pipe).v_proj.weight
    weight.data = 3.0 * weight.data


def replace_parameter(pipe: Any) -> None:
    attention(pipe).v_proj.weight = nn.Parameter(3.0 * attention(pipe).v_proj.weight.data)


def replace_encoder(pipe: Any) -> None:
    torch.manual_seed(1)
    pipe.text_encoder = type(pipe.text_encoder)(pipe.text_encoder.config).eval()


def cast(pipe: Any) -> None:
    pipe.text_encoder.to(torch.bfloat16)


def set_row(pipe: Any) -> None:
    """As a textual inversion does, of one word."""
    (word,) = pipe.tokenizer("cat", add_special_tokens=False).input_ids[:1]
    pipe.text_encoder.get_input_embeddings().weight.data[word] = 7.0


def add_word(pipe: Any) -> None:
    pipe.tokenizer.add_tokens(["cat"])
    pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer))


def replace_tokenizer(pipe: Any) -> None:
    pipe.tokenizer = copy.deepcopy(pipe.tokenizer)
    pipe.tokenizer.padding_side = "left"


def set_tokenizer(pipe: Any) -> None:
    pipe.tokenizer.model_max_length = 16


def set_epsilon(pipe: Any) -> None:
    pipe.text_encoder.final_layer_norm.eps = 0.5


CHANGES = [
    load,
    load_fuse_and_unload,
    load_state,
    write_through_data,
    set_data,
    replace_parameter,
    replace_encoder,
    cast,
    set_row,
    add_word,
    replace_tokenizer,
    set_tokenizer,
    set_epsilon,
]


def check_change(pipe: Any, change: Callable[[], Any]) -> None:
    before = encode(pipe)
    assert same(encode(pipe), before)
    change()
    wanted = uncached(pipe)
    changed = before[0].shape != wanted[0].shape or not same(before, wanted)
    assert changed, "the change must matter, or nothing is tested"
    with Forwards(pipe) as forwards:
        assert same(encode(pipe), wanted)
        assert forwards.number > 0
        assert forwards.of(lambda: encode(pipe)) == 0
    assert same(encode(pipe), wanted)


@pytest.mark.parametrize("change", CHANGES, ids=lambda c: c.__name__)
def test_a_change_of_what_encodes_is_seen(change: Callable[[Any], None], pipe: Any) -> None:
    with cached(pipe):
        check_change(pipe, lambda: change(pipe))


@pytest.mark.parametrize(
    "change",
    [
        lambda a, pipe: a.scaling.update(default=1.0),
        lambda a, pipe: setattr(a, "_disable_adapters", True),
        lambda a, pipe: a.lora_B.weight.data.mul_(-1.0),
        lambda a, pipe: (a.merge(), a.scaling.update(default=1.0), unloaded(pipe), loaded(pipe)),
        lambda a, pipe: unloaded(pipe),
    ],
    ids=["scale", "disable", "swap", "fuse and load another", "unload"],
)
def test_a_change_of_an_adapter_is_seen(change: Callable[[Adapter, Any], None], pipe: Any) -> None:
    adapter = loaded(pipe)
    with cached(pipe):
        check_change(pipe, lambda: change(adapter, pipe))


@pytest.mark.parametrize("placement", PLACEMENTS, ids=lambda p: p.name)
def test_an_adapter_that_is_loaded_is_seen_wherever_the_weights_are(
    placement: Any, pipe: Any
) -> None:
    """Of weights that move, nobody can look at the values; those of an adapter lie still."""
    with torch.no_grad(), fit(pipe, Plan((placement,))):
        plain = image(pipe)
        adapter = loaded(pipe)
        with Forwards(pipe) as forwards:
            first = image(pipe)
            assert forwards.number > 0
            adapter.lora_B.weight.data.mul_(-1.0)
            assert forwards.of(lambda: image(pipe)) > 0
            second = image(pipe)
        unloaded(pipe)
        assert np.array_equal(image(pipe), plain)
    assert not np.array_equal(first, plain)
    assert not np.array_equal(first, second)


def test_a_setting_of_the_pipe_is_seen(pipes: Pipes) -> None:
    pipe = pipes["tiny-sdxl"]
    found = pipe.config.force_zeros_for_empty_prompt
    with cached(pipe) as forwards:
        image(pipe)
        pipe.register_to_config(force_zeros_for_empty_prompt=not found)
        try:
            assert forwards.of(lambda: image(pipe)) > 0
        finally:
            pipe.register_to_config(force_zeros_for_empty_prompt=found)


def test_what_an_encoding_sets_on_the_pipe_is_set_again() -> None:
    pipe = build("tiny-flux")

    def scaled(scale: float) -> None:
        pipe.encode_prompt("a cat", lora_scale=scale)
        assert pipe._lora_scale == scale

    with cached(pipe) as forwards:
        assert forwards.of(lambda: scaled(0.5)) == forwards.of(lambda: scaled(0.25)) == 2
        assert forwards.of(lambda: scaled(0.5)) == 0


def test_what_is_drawn_at_random_is_drawn_again(pipe: Any) -> None:
    pipe.text_encoder.encoder.layers[0].mlp = nn.Sequential(
        pipe.text_encoder.encoder.layers[0].mlp, nn.Dropout(0.5)
    )
    pipe.text_encoder.train()
    with cached(pipe) as forwards:
        assert not same(encode(pipe), encode(pipe))
        assert forwards.number == 4
        pipe.text_encoder.eval()
        assert same(encode(pipe), encode(pipe))
        assert forwards.number == 6


# ---------------------------------------------------------------- what is given and kept


def test_a_caller_may_write_to_what_it_is_given(pipe: Any) -> None:
    with cached(pipe):
        wanted = uncached(pipe)
        for _ in range(3):
            given = encode(pipe)
            assert same(given, wanted)
            for tensor in given:
                tensor.zero_()


def test_the_oldest_of_too_many_is_forgotten(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "ENTRIES", 2)
    with cached(pipe) as forwards:
        for prompt in ("a cat", "a dog", "a cat", "a bird"):
            encode(pipe, prompt)
        assert forwards.number == 6
        assert forwards.of(lambda: (encode(pipe, "a cat"), encode(pipe, "a bird"))) == 0
        assert forwards.of(lambda: encode(pipe, "a dog")) == 2


def test_bytes_are_bounded_too(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with cached(pipe) as forwards:
        one_bytes = sum(t.nbytes for t in encode(pipe))
        monkeypatch.setattr(prompts, "MAX_BYTES", 2 * one_bytes)
        for prompt in ("a dog", "a bird"):
            encode(pipe, prompt)
        assert forwards.of(lambda: encode(pipe, "a dog")) == 0
        assert forwards.of(lambda: encode(pipe, "a cat")) == 2
        three = ["a cat", "a dog", "a bird"]
        assert forwards.of(lambda: (encode(pipe, three), encode(pipe, three))) == 4  # too large
        monkeypatch.setattr(prompts, "MAX_BYTES", 10 * one_bytes)
        assert forwards.of(lambda: (encode(pipe, three), encode(pipe, three))) == 2


class Encoder:
    """As much of a pipe as matters here."""

    def __init__(self, made: Callable[[], Any]) -> None:
        self.components: dict[str, Any] = {}
        self.config: dict[str, Any] = {}
        self._made = made

    def encode_prompt(self, prompt: str) -> Any:
        return self._made()


@pytest.mark.parametrize(
    ("made", "is_kept"),
    [
        (lambda: torch.ones(2, 3), True),
        (lambda: (torch.ones(2), None, [torch.zeros(1)], {"length": 3}), True),
        (lambda: (torch.ones(2), threading.Lock()), False),
        (lambda: torch.nn.Parameter(torch.ones(2)), False),
        (lambda: torch.ones(1, 3).expand(4, 3), False),  # a copy of it lies otherwise
        (lambda: torch.ones(2, 3).T, True),
        (lambda: torch.rand(2), False),
    ],
    ids=["tensor", "nested", "object", "parameter", "expanded", "transposed", "random"],
)
def test_what_cannot_be_given_again_as_it_was_is_not_kept(
    made: Callable[[], Any], is_kept: bool
) -> None:
    calls: list[int] = []
    pipe = Encoder(lambda: calls.append(1) or made())
    with torch.no_grad(), prompts.cached(pipe):
        first, again = pipe.encode_prompt("a cat"), pipe.encode_prompt("a cat")
    assert len(calls) == (1 if is_kept else 2)
    if isinstance(first, torch.Tensor):
        assert first.stride() == again.stride()
        assert first.data_ptr() != again.data_ptr()
    else:
        assert str(first) == str(again) or not is_kept
        assert type(first) is type(again)


def test_a_pipe_that_has_no_such_method_is_left_alone() -> None:
    pipe = SimpleNamespace()
    with prompts.cached(pipe):
        assert vars(pipe) == {}


def test_one_that_wrapped_it_before_is_asked_and_comes_back(pipe: Any) -> None:
    found = pipe.encode_prompt
    asked: list[Any] = []
    pipe.encode_prompt = own = lambda *a, **k: asked.append(a) or found(*a, **k)
    with cached(pipe):
        encode(pipe)
        encode(pipe)
    assert len(asked) == 1
    assert pipe.encode_prompt is own


def test_threads_may_encode_at_once(pipe: Any) -> None:
    words = [f"a cat, {number % 3}" for number in range(12)]
    with torch.no_grad():
        wanted = {word: uncached(pipe, word) for word in words}
    faults: list[str] = []

    def work(word: str) -> None:
        with torch.no_grad():
            for _ in range(3):
                if not same(encode(pipe, word), wanted[word]):
                    faults.append(word)

    with cached(pipe):
        threads = [threading.Thread(target=work, args=(word,)) for word in words]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert faults == []


def test_one_thread_encodes_at_a_time(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer is told how to pad before each call, by whoever comes last."""
    inside, most = [0], [0]
    found = type(pipe).encode_prompt

    def encode_prompt(self: Any, *args: Any, **kwargs: Any) -> Any:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        time.sleep(0.02)
        made = found(self, *args, **kwargs)
        inside[0] -= 1
        return made

    monkeypatch.setattr(type(pipe), "encode_prompt", functools.wraps(found)(encode_prompt))

    def work(number: int) -> None:
        with torch.set_grad_enabled(number == 0):  # which is not kept, and waits its turn as well
            encode(both[number % 2], f"a cat, {number}")

    both = pipe, type(pipe)(**pipe.components)  # whose tokenizers are the same
    with cached(both[0]), cached(both[1]):
        threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert most == [1]


def test_pixart_sigma_is_served_with_its_masks() -> None:
    """Its embeddings come with masks, and its text encoder is a T5 alone."""
    flux = build("tiny-flux", dtype="float32")
    pipe = diffusers.PixArtSigmaPipeline(
        tokenizer=flux.tokenizer_2,
        text_encoder=flux.text_encoder_2,
        vae=None,
        transformer=None,
        scheduler=None,
    )
    asked = {"negative_prompt": "blurred", "max_sequence_length": 16, "device": "cpu"}
    with cached(pipe) as forwards:
        first = pipe.encode_prompt("a cat", **asked)
        again = pipe.encode_prompt("a cat", **asked)
        assert forwards.number == 2
        assert len(first) == 4
        assert same(first, again)
