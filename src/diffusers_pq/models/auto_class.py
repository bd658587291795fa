"""How `AutoModel` of diffusers finds the models of this package."""

import inspect
import json
import os
from pathlib import Path


CODE_FILE = "diffusers_pq.py"


class AutoModelMixin:
    """
    Put before a `ModelMixin`, lets `AutoModel.from_pretrained(folder, trust_remote_code=True)` load what it saves,
    with or without `diffusers_pq`: by an `auto_map` in its `config.json`, and the code of the class beside it.
    """

    @classmethod
    def extract_init_dict(cls, config_dict: dict, **kwargs) -> tuple[dict, dict, dict]:
        # Not a setting of the model, about which the parent would warn.
        return super().extract_init_dict({k: v for k, v in config_dict.items() if k != "auto_map"}, **kwargs)

    def to_json_string(self) -> str:
        config = json.loads(super().to_json_string())
        if self._is_shipped():
            config["auto_map"] = {"AutoModel": f"{Path(CODE_FILE).stem}.{type(self).__name__}"}
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    def to_json_file(self, json_file_path: str | os.PathLike):
        """Write `config.json`, and the code beside it."""
        super().to_json_file(json_file_path)
        if self._is_shipped():
            Path(json_file_path).with_name(CODE_FILE).write_text(self.code(), encoding="utf-8")

    @classmethod
    def code(cls) -> str:
        """The class in one file that needs diffusers alone, see `diffusers_pq.models.standalone`."""
        own_file = Path(inspect.getfile(cls))
        if own_file.name == CODE_FILE:  # this is that file
            return own_file.read_text(encoding="utf-8")
        from . import standalone

        return standalone.standalone_code(cls)

    @classmethod
    def _is_shipped(cls) -> bool:
        """Of the package or of that file; a class that somebody derives from it has its code elsewhere."""
        return Path(CODE_FILE).stem in cls.__module__.split(".")
