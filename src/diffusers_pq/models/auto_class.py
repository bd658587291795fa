"""How `AutoModel` of diffusers finds the models of this package."""

import json
import os
from pathlib import Path


_CODE = "from diffusers_pq import {name}  # noqa: F401\n"


class AutoModelMixin:
    """
    Put before a `ModelMixin`, lets `AutoModel.from_pretrained(folder, trust_remote_code=True)` load what it saves: by
    an `auto_map` in its `config.json`, and code beside it that imports the class from `diffusers_pq`.
    """

    @classmethod
    def extract_init_dict(cls, config_dict: dict, **kwargs) -> tuple[dict, dict, dict]:
        # Not a setting of the model, about which the parent would warn.
        return super().extract_init_dict({k: v for k, v in config_dict.items() if k != "auto_map"}, **kwargs)

    def to_json_string(self) -> str:
        config = json.loads(super().to_json_string())
        config["auto_map"] = {"AutoModel": f"diffusers_pq.{type(self).__name__}"}
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    def to_json_file(self, json_file_path: str | os.PathLike):
        """Write `config.json`, and the code beside it."""
        super().to_json_file(json_file_path)
        code = _CODE.format(name=type(self).__name__)
        Path(json_file_path).with_name("diffusers_pq.py").write_text(code, encoding="utf-8")
