"""Where dry runs find a model: names, folders with nothing but JSON, Hub ids, living pipes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import Pipes
from test_dryrun import BF16, LARGE, TILED, assert_alike, fresh, workload  # noqa: F401

from autofit import anatomy, probe
from autofit.architectures import build
from autofit.dryrun import DryRun
from autofit.spec import BadInput


@pytest.mark.parametrize("model", ["tiny-sdxl", "tiny-flux"])
class TestAnyModel:
    def test_a_name_and_a_pipe_have_the_same_facts(self, model: str, pipes: Pipes) -> None:
        asked = workload(model, LARGE)
        assert DryRun(model).phases(asked) == DryRun(pipes[model]).phases(asked)

    def test_a_name_in_half_precision_is_a_pipe_built_in_it(self, model: str) -> None:
        asked = workload(model)
        made = DryRun(build(model, dtype="float16")).phases(asked)
        assert DryRun(model, dtype="float16").phases(asked) == made

    def test_a_folder_needs_its_json_files_alone(
        self, model: str, pipes: Pipes, tmp_path: Path
    ) -> None:
        folder = tmp_path / "saved"
        pipes[model].save_pretrained(folder)
        for path in folder.rglob("*"):
            keep = path.name in ("model_index.json", "config.json") or "_config" in path.name
            if path.is_file() and not keep:
                path.unlink()
        assert {p.suffix for p in folder.rglob("*.*") if p.is_file()} == {".json"}
        asked = workload(model, LARGE)
        assert_alike(DryRun(str(folder)).phases(asked), DryRun(pipes[model]).phases(asked))

    def test_a_pipe_is_left_as_it_was(self, model: str, pipes: Pipes) -> None:
        pipe = pipes[model]
        parts = anatomy.modules(pipe).values()
        before = [(t, t.data_ptr(), dict(vars(m))) for m in parts for _, _, t in anatomy.tensors(m)]
        scheduler, found = dict(vars(pipe.scheduler)), probe.fingerprint(pipe)
        DryRun(pipe).phases(workload(model), [BF16, TILED])
        after = [(t, t.data_ptr(), dict(vars(m))) for m in parts for _, _, t in anatomy.tensors(m)]
        for (old, at, attributes), (new, now, left) in zip(before, after, strict=True):
            assert new is old
            assert now == at
            assert left.keys() == attributes.keys()
        assert vars(pipe.scheduler).keys() >= scheduler.keys()
        assert not {"step", "set_timesteps", "scale_model_input"} & vars(pipe.scheduler).keys()
        assert probe.fingerprint(pipe) == found


class TestSources:
    def test_a_folder_takes_the_dtype_that_is_asked_for(self, pipes: Pipes, tmp_path: Path) -> None:
        pipes["tiny-sd"].save_pretrained(tmp_path / "saved")
        found = DryRun(str(tmp_path / "saved"), dtype="float16").phases(workload("tiny-sd"))
        assert_alike(found, DryRun("tiny-sd", dtype="float16").phases(workload("tiny-sd")))

    def test_a_hub_id_downloads_the_json_files(
        self, pipes: Pipes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pipes["tiny-sd"].save_pretrained(tmp_path / "saved")
        asked: dict[str, Any] = {}

        def snapshot_download(model: str, **options: Any) -> str:
            asked.update(options, model=model)
            return str(tmp_path / "saved")

        monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
        found = DryRun("someone/tiny").phases(workload("tiny-sd"))
        assert_alike(found, DryRun("tiny-sd").phases(workload("tiny-sd")))
        assert asked["model"] == "someone/tiny"
        assert all(pattern.endswith(".json") for pattern in asked["allow_patterns"])

    def test_the_hub_out_of_reach(self) -> None:
        with pytest.raises(BadInput, match="'someone/tiny': could not reach the Hub"):
            DryRun("someone/tiny")

    @pytest.mark.parametrize(
        ("model", "dtype", "message"),
        [
            ("tiny-se", None, "not built in. Did you mean"),
            ("./nowhere", None, "no such folder"),
            ("tiny-sd", "int3", "dtype 'int3': weights can be float32"),
        ],
    )
    def test_that_are_none(self, model: str, dtype: str | None, message: str) -> None:
        with pytest.raises(BadInput, match=message):
            DryRun(model, dtype=dtype).phases(workload("tiny-sd"))

    def test_a_folder_without_an_index(self, tmp_path: Path) -> None:
        with pytest.raises(BadInput, match=r"has no model_index\.json"):
            DryRun(str(tmp_path)).phases(workload("tiny-sd"))

    def test_a_folder_of_unknown_classes(self, tmp_path: Path) -> None:
        index = {"_class_name": "NoPipeline", "vae": ["diffusers", "NoVae"]}
        (tmp_path / "model_index.json").write_text(json.dumps(index))
        with pytest.raises(BadInput, match="NoVae"):
            DryRun(str(tmp_path)).phases(workload("tiny-sd"))
