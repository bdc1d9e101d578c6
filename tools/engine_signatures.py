"""Write the signatures of a GPU library that our engine calls, for the tests: names and kinds, nothing else.

python tools/engine_signatures.py vllm WHEEL        from a vLLM wheel (a zip) or its unpacked folder
python tools/engine_signatures.py tensorrt_llm      from an installed tensorrt_llm, where there is one
python tools/engine_signatures.py tensorrt_llm FILE from signatures that were read elsewhere, as JSON
Prints JSON.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import sys
import zipfile
from pathlib import Path
from typing import Any

# Class: its file, whether its parameters are its fields, and the methods that we call.
_VLLM: dict[str, tuple[str, bool, tuple[str, ...]]] = {
    "AsyncLLM": (
        "vllm/v1/engine/async_llm.py",
        False,
        ("from_engine_args", "generate", "shutdown", "sleep", "wake_up", "collective_rpc"),
    ),
    "EngineArgs": ("vllm/engine/arg_utils.py", True, ()),
    "AsyncEngineArgs": ("vllm/engine/arg_utils.py", True, ()),
    "SamplingParams": ("vllm/sampling_params.py", True, ()),
    "LoRARequest": ("vllm/lora/request.py", True, ()),
    "CompletionOutput": ("vllm/outputs.py", True, ()),
    "RequestOutput": ("vllm/outputs.py", False, ("__init__",)),
    "Logprob": ("vllm/logprobs.py", True, ()),
    "FlatLogprobs": ("vllm/logprobs.py", True, ("__getitem__", "__len__")),
    "RequestOutputKind": ("vllm/sampling_params.py", True, ()),
    "EngineDeadError": ("vllm/v1/engine/exceptions.py", False, ()),
}
_TENSORRT_LLM = {
    "LLM": ("generate_async", "shutdown"),
    "SamplingParams": (),
    "KvCacheConfig": (),
    "RequestOutput": ("abort",),
    "CompletionOutput": (),
    "Logprob": (),
}


def main() -> None:
    """Run the command."""
    kind, *rest = sys.argv[1:]
    found = _vllm(Path(rest[0])) if kind == "vllm" else _tensorrt_llm(Path(rest[0]) if rest else None)
    sys.stdout.write(_compact(found) + "\n")


def _compact(found: dict[str, Any]) -> str:
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in found.items()]
    return "{\n" + ",\n".join(lines) + "\n}"


def _vllm(source: Path) -> dict[str, Any]:
    if source.is_dir():
        (info,) = source.glob("vllm-*.dist-info")
        version, read = (
            info.name.split("-")[1].removesuffix(".dist"),
            lambda name: (source / name).read_text(),
        )
    else:
        archive = zipfile.ZipFile(source)
        version, read = source.name.split("-")[1], lambda name: archive.read(name).decode()
    found: dict[str, Any] = {"package": "vllm", "version": version}
    for name, (file, has_fields, methods) in _VLLM.items():
        tree = ast.parse(read(file))
        (node,) = [each for each in tree.body if isinstance(each, ast.ClassDef) and each.name == name]
        entry: dict[str, Any] = {"file": file}
        if has_fields:
            entry["fields"] = _fields(node)
        for each in ast.walk(node):
            if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef) and each.name in methods:
                entry.setdefault("methods", {}).setdefault(each.name, _parameters(each))
        missing = set(methods) - set(entry.get("methods", {}))
        if missing:
            sys.exit(f"{name} of {file} has no {', '.join(missing)}")
        found[name] = entry
    return found


def _fields(node: ast.ClassDef) -> list[str]:
    annotated = [
        each.target.id
        for each in node.body
        if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name)
    ]
    plain = [
        target.id
        for each in node.body
        if isinstance(each, ast.Assign)
        for target in each.targets
        if isinstance(target, ast.Name)
    ]
    return [name for name in annotated + plain if not name.startswith("_")]


def _parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> dict[str, str]:
    """Return the kind of each parameter: "positional" or "keyword", with a "?" where it may be left out."""
    arguments = node.args
    positional = [
        each.arg for each in arguments.posonlyargs + arguments.args if each.arg not in {"self", "cls"}
    ]
    optional = set(positional[len(positional) - len(arguments.defaults) :] if arguments.defaults else ())
    kinds = {name: "positional" + "?" * (name in optional) for name in positional}
    for each, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        kinds[each.arg] = "keyword" + "?" * (default is not None)
    return kinds


def _tensorrt_llm(file: Path | None) -> dict[str, Any]:
    if file is None:
        return _installed_tensorrt_llm()
    classes = json.loads(file.read_text())["classes"]

    def names(key: str) -> list[str]:
        return [name for name in classes[key]["init"] if not name.startswith("*")]

    def calls(key: str) -> dict[str, Any]:
        return {
            method: dict.fromkeys(classes[key]["methods"][method]["params"], "positional")
            for method in _TENSORRT_LLM["LLM"]
            if method in classes[key]["methods"]
        }

    newer = set(names("tensorrt_llm.llmapi.KvCacheConfig"))
    lines = {
        "1.2": (
            "tensorrt_llm.LLM@1.2rc",
            newer - {"disk_cache_size", "disk_cache_path", "block_reuse_config"},
        ),
        "1.3": ("tensorrt_llm.LLM", newer),
    }
    found: dict[str, Any] = {"package": "tensorrt_llm", "versions": list(lines)}
    for line, (key, cache) in lines.items():
        found[line] = {
            "LLM": {
                "fields": sorted({*names(key), *names("tensorrt_llm.llmapi.TorchLlmArgs")}),
                "methods": {**calls("tensorrt_llm.LLM@1.2rc"), **calls(key)},
            },
            "SamplingParams": {"fields": names("tensorrt_llm.SamplingParams")},
            "KvCacheConfig": {"fields": sorted(cache)},
            "CompletionOutput": {
                "fields": [
                    *names("tensorrt_llm.llmapi.CompletionOutput"),
                    *classes["tensorrt_llm.llmapi.CompletionOutput"]["properties"],
                ]
            },
            "RequestOutput": {"methods": {"abort": {}}},
            "Logprob": {"fields": names("tensorrt_llm.executor.result.Logprob")},
        }
    return found


def _installed_tensorrt_llm() -> dict[str, Any]:
    library, api = importlib.import_module("tensorrt_llm"), importlib.import_module("tensorrt_llm.llmapi")
    line = ".".join(library.__version__.split(".")[:2])
    arguments = importlib.import_module("tensorrt_llm.llmapi.llm_args").TorchLlmArgs
    methods = {
        name: {
            each: "positional"
            for each in inspect.signature(getattr(library.LLM, name)).parameters
            if each != "self"
        }
        for name in _TENSORRT_LLM["LLM"]
    }
    return {
        "package": "tensorrt_llm",
        "versions": [line],
        line: {
            "LLM": {"fields": sorted(arguments.model_fields), "methods": methods},
            "SamplingParams": {"fields": list(inspect.signature(library.SamplingParams).parameters)},
            "KvCacheConfig": {"fields": sorted(api.KvCacheConfig.model_fields)},
        },
    }


if __name__ == "__main__":
    main()
