"""Settings of the run, as the script's own class has them."""

import dataclasses
import typing

from utils.settings import run_settings


def test_settings_of_the_run_are_settings_of_the_script(grpo):
    own = {field.name: field.type for field in dataclasses.fields(run_settings.RunSettings)}
    every = {field.name: field.type for field in dataclasses.fields(grpo.MLXGRPOConfig)}
    assert own == {name: kind for name, kind in every.items() if name in own}
    assert typing.get_type_hints(run_settings.Settings).keys() >= own.keys()
