"""Print the JSON schema of a config file: python -m proard.config.schema > workflow/schemas/config.schema.yaml."""

from __future__ import annotations

import sys

import yaml

from proard.config.run import json_schema

HEADER = "# Generated from the settings classes; do not edit: python -m proard.config.schema > {path}\n"
PATH = "workflow/schemas/config.schema.yaml"


def schema_text() -> str:
    """The JSON schema of a config file as YAML, as committed in `workflow/schemas/`.

    Returns
    -------
    str
        Draft 2020-12, with the default of every key and with descriptions from the settings classes.
    """
    return HEADER.format(path=PATH) + yaml.safe_dump(json_schema(), sort_keys=False, width=120, allow_unicode=True)


if __name__ == "__main__":
    sys.stdout.write(schema_text())
