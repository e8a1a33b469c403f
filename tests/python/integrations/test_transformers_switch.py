# SPDX-License-Identifier: Apache-2.0
"""Switching transformers' Mamba on and off, with modules that stand for those of transformers."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType

import pytest
import torch

from mixture_of_mamba.integrations import transformers as switch

REQUIRED = ("causal_conv1d_fn", "causal_conv1d_update", "mamba_selective_scan", "mamba_selective_state_update")


def forget_transformers(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "transformers"]:
        monkeypatch.delitem(sys.modules, name)


@pytest.fixture
def stand_in(monkeypatch):
    """Adds ``modeling_<model>`` with functions of the given names, each of which returns its own name."""
    forget_transformers(monkeypatch)
    for name in ("transformers", "transformers.models"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["transformers"].__version__ = "0.0.1"

    def add(model, names):
        module = ModuleType(f"transformers.models.{model}.modeling_{model}")
        for name in names:
            setattr(module, name, lambda *args, _name=name, **kwargs: _name)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        return module

    yield add
    switch.disable()


def test_exactly_what_was_there_comes_back(stand_in):
    modules = [stand_in("mamba", (*REQUIRED, "mamba_inner_fn")), stand_in("zamba", REQUIRED)]
    before = [dict(vars(module)) for module in modules]
    assert switch.enable() == ("mamba", "zamba")
    for module, was in zip(modules, before, strict=True):
        assert {name for name in was if getattr(module, name) is not was[name]} == {
            name for name in was if name in REQUIRED or name == "mamba_inner_fn"
        }
    switch.disable()
    assert [dict(vars(module)) for module in modules] == before


def test_nested_and_repeated(stand_in):
    module = stand_in("mamba", REQUIRED)
    original = module.mamba_selective_scan
    switch.disable()  # without enable: nothing
    assert switch.enable() == switch.enable() == ("mamba",)
    ours = module.mamba_selective_scan
    with switch.enabled():
        assert module.mamba_selective_scan is ours
    assert module.mamba_selective_scan is ours
    with switch.enabled():
        switch.disable()
    assert module.mamba_selective_scan is not original
    switch.disable()
    assert module.mamba_selective_scan is original

    def fail_inside():
        with switch.enabled(), switch.enabled():
            assert module.mamba_selective_scan is not original
            raise KeyError

    pytest.raises(KeyError, fail_inside)
    assert module.mamba_selective_scan is original


def test_a_model_of_another_form_is_left_alone(stand_in):
    stand_in("mamba", REQUIRED)
    other = stand_in("jamba", REQUIRED[:2])
    before = dict(vars(other))
    with switch.enabled():
        assert switch.enable() == ("mamba",)
        assert dict(vars(other)) == before


def test_what_has_no_counterpart_stays_with_transformers(stand_in):
    module = stand_in("mamba", REQUIRED)
    x, weight = torch.randn(2, 3, 1), torch.randn(3, 4)
    with switch.enabled():
        assert module.causal_conv1d_fn(x, weight, activation="gelu") == "causal_conv1d_fn"
        assert module.causal_conv1d_update(x, torch.zeros(2, 3, 4), weight, activation="gelu") == "causal_conv1d_update"
        weight.requires_grad_()
        assert module.causal_conv1d_update(x, torch.zeros(2, 3, 4), weight) == "causal_conv1d_update"
        step = torch.zeros(2, 3, 5), x[..., 0], x[..., 0], torch.zeros(3, 5).requires_grad_(), *torch.zeros(2, 2, 5)
        assert module.mamba_selective_state_update(*step) == "mamba_selective_state_update"
        with torch.no_grad():
            assert module.causal_conv1d_update(x, torch.zeros(2, 3, 4), weight).shape == x.shape
            assert module.mamba_selective_state_update(*step).shape == (2, 3)


@pytest.mark.parametrize("name", ["seq_idx", "cu_seqlens"])
def test_packed_sequences_are_refused(stand_in, name):
    module = stand_in("mamba", REQUIRED)
    with (
        switch.enabled(),
        pytest.raises(ValueError, match=f"{name} must be None: .*would see each other, got a Tensor"),
    ):
        module.causal_conv1d_fn(torch.randn(1, 3, 6), torch.randn(3, 4), **{name: torch.zeros(1, 6)})


def test_sentence_for_another_version(stand_in):
    module = stand_in("mamba", REQUIRED[:3])
    before = dict(vars(module))
    sentence = (
        r"transformers.models.mamba.modeling_mamba must have the functions causal_conv1d_fn, causal_conv1d_update, "
        r"mamba_selective_scan, mamba_selective_state_update, but in transformers 0.0.1 there is no "
        r"mamba_selective_state_update$"
    )
    for _ in range(2):
        with pytest.raises(ImportError, match=sentence):
            switch.enable()
    assert dict(vars(module)) == before


def test_sentence_without_transformers(monkeypatch):
    forget_transformers(monkeypatch)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"needs transformers, which is not installed: pip install transformers"):
        switch.enable()


def test_importing_imports_nothing_of_transformers():
    code = (
        "import sys, mixture_of_mamba, mixture_of_mamba.integrations.transformers as switch; switch.disable(); "
        "assert not [name for name in sys.modules if name.split('.')[0] == 'transformers']"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
