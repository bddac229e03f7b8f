"""Policies as the command line names them: NAME or NAME,SETTING=VALUE,..."""

from __future__ import annotations

import dataclasses

from evosample import InvalidArgumentError, Policy
from evosample.sampling import POLICIES, InvalidValue, custom_policy

POLICY_HELP = (
    "NAME or NAME,SETTING=VALUE,... such as evolved-sampling,prune_ratio=0.2. There are "
    f"{', '.join(name.replace('_', '-') for name in POLICIES)}, and those of installed packages."
)


def policy_of(text: str) -> Policy:
    """The policy that NAME,SETTING=VALUE,... describes; raises InvalidArgumentError."""
    name, *settings = text.split(",")
    try:
        kind = POLICIES.get(name.replace("-", "_")) or custom_policy(name)
        if kind is None:
            known = ", ".join(known.replace("_", "-") for known in POLICIES)
            raise InvalidArgumentError(
                f"--policy {text}: there is no policy {name!r} here; expected one of {known}, or one of an installed "
                "package",
                field="policy",
            )
        fields = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]  # policies are
        given: dict[str, bool | int | float | str] = {}
        for setting in settings:
            key, is_given, value = setting.partition("=")
            if not is_given or key not in fields:
                raise InvalidArgumentError(
                    f"--policy {text}: {setting!r} is no setting of {name}; expected "
                    f"{' or '.join(f'{field}=VALUE' for field in sorted(fields)) or 'none: it has no settings'}",
                    field="policy",
                )
            given[key] = _value(value)
        return kind(**given)
    except InvalidValue as error:
        raise InvalidArgumentError(f"--policy {text}: {error}", field="policy") from error


def _value(text: str) -> bool | int | float | str:
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
