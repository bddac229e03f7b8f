"""What the site has besides the pages of this folder: a reference made from the code, and the examples."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2
from grpc_tools import protoc
from mkdocs.structure.files import File, Files
from pydantic_core import PydanticUndefined
from typer.main import get_command

from evosample import cli
from evosample_server.settings import Settings

ROOT = Path(__file__).parents[1]
PROTO = ROOT / "proto/evosample/v1"

_MODULES = {
    "client": ("Python client", ["evosample"]),
    "torch": ("evosample.torch", ["evosample.torch"]),
    "trainers": ("Trainers and datasets", ["evosample.lightning", "evosample.huggingface", "evosample.webdataset"]),
    "comparison": ("Comparisons", ["evosample.comparison"]),
    "sampling": ("The algorithm", ["evosample.sampling"]),
}


def on_files(files: Files, config: Any) -> Files:
    """Add what is made here."""
    pages = {f"reference/{name}.md": _modules(*of) for name, of in _MODULES.items()}
    pages |= {
        "reference/cli.md": _command_line(),
        "reference/server.md": _server_options(),
        "reference/protocol.md": _protocol(),
    }
    for path, content in pages.items():
        files.append(File.generated(config, path, content=content))
    for pattern in ("examples/*/*.py", "docker/*/*.yaml", "docker/*/*/*.json"):
        for file in sorted(ROOT.glob(pattern)):
            files.append(File.generated(config, str(file.relative_to(ROOT)), abs_src_path=str(file)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links to what lies beside docs/ in the repository lead to its copy in the site."""
    markdown = re.sub(r"\]\(\.\./README\.md[^)]*\)", "](index.md)", markdown)
    return re.sub(r"\]\(\.\./(examples|docker)/", r"](\1/", markdown)


def _modules(title: str, modules: list[str]) -> str:
    return "\n\n".join([f"# {title}", *(f"::: {module}" for module in modules)])


_JSON = (
    "With `--json` a command prints one line (`watch`: one for every look). Its fields are those of the "
    "[Python client's](client.md) classes, such as `ExperimentStatus`; times are in ISO 8601, `null` stands for what "
    "is not there or not finite. Later versions may add fields. Errors and questions go to stderr."
)


def _command_line() -> str:
    command: Any = get_command(cli.app)
    parts = ["# Command line", "`evosample --help` says the same.", command.help, command.epilog, _JSON]
    return "\n\n".join(parts + _commands("evosample", command))


def _commands(path: str, group: Any) -> list[str]:
    parts = []
    for name, each in sorted(group.commands.items()):
        parts += [f"## {path} {name}", each.help]
        if hasattr(each, "commands"):
            parts += _commands(f"{path} {name}", each)
        else:
            parts.append("| | |\n|---|---|\n" + "".join(map(_parameter, each.params)))
    return parts


def _parameter(parameter: Any) -> str:
    names = f"`{parameter.name.upper()}`" if parameter.param_type_name == "argument" else ""
    names = names or ", ".join(f"`{option}`" for option in parameter.opts + parameter.secondary_opts)
    default = parameter.default
    said = [parameter.help or ""]
    if parameter.required and parameter.param_type_name == "option":
        said.append("Required.")
    if default not in (None, (), [], "") and default is not False and not callable(default):
        said.append(f"Default: `{default}`.")
    if getattr(parameter, "envvar", None):
        said.append(f"Or the environment variable `{parameter.envvar}`.")
    return f"| {names} | {_cell(' '.join(said))} |\n"


def _server_options() -> str:
    rows = ["# Server options", "Each of them as an option of `evosample-server`, or as an environment variable."]
    table = ["| option | environment | default | |", "|---|---|---|---|"]
    for name, field in Settings.model_fields.items():
        default = "" if field.default in (None, PydanticUndefined) else f"`{field.default}`"
        option, variable = f"`--{name.replace('_', '-')}`", f"`EVOSAMPLE_{name.upper()}`"
        table.append(f"| {option} | {variable} | {default} | {field.description} |")
    return "\n\n".join([*rows, "\n".join(table)])


def _protocol() -> str:
    """The protocol from its descriptors, whose comments are Markdown."""
    out = ROOT / ".venv/protocol.bin"
    names = [str(path.relative_to(ROOT / "proto")) for path in sorted(PROTO.glob("*.proto"))]
    options = [f"-I{ROOT / 'proto'}", "--include_source_info", f"--descriptor_set_out={out}"]
    include = Path(protoc.__file__).parent / "_proto"
    if protoc.main(["protoc", f"-I{include}", *options, *names]) != 0:
        raise RuntimeError("protoc failed")
    parts = ["# Protocol"]
    for file in descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes()).file:
        comments = {tuple(at.path): at.leading_comments for at in file.source_code_info.location}
        for number, service in enumerate(file.service):
            parts += [f"## {service.name}", _prose(comments.get((6, number), ""))]
            for index, method in enumerate(service.method):
                request, response = (kind.rpartition(".")[2] for kind in (method.input_type, method.output_type))
                streams = ("stream " * method.client_streaming, "stream " * method.server_streaming)
                parts.append(f"### {method.name}\n\n`{streams[0]}{request}` → `{streams[1]}{response}`")
                parts.append(_prose(comments.get((6, number, 2, index), "")))
        parts.append("## Messages")
        for number, message in enumerate(file.message_type):
            parts += [f"### {message.name}", _prose(comments.get((4, number), ""))]
            rows = [
                f"| `{field.name}` | {_kind(field)} | {_cell(comments.get((4, number, 2, index), ''))} |"
                for index, field in enumerate(message.field)
            ]
            if rows:
                parts.append("\n".join(["| field | type | |", "|---|---|---|", *rows]))
        for number, enum in enumerate(file.enum_type):
            rows = [
                f"| `{value.name}` | {value.number} | {_cell(comments.get((5, number, 2, index), ''))} |"
                for index, value in enumerate(enum.value)
            ]
            parts += [f"### {enum.name}", _prose(comments.get((5, number), ""))]
            parts.append("\n".join(["| value | number | |", "|---|---|---|", *rows]))
    return "\n\n".join(parts)


def _kind(field: Any) -> str:
    name = field.type_name.rpartition(".")[2]
    if not name:
        name = descriptor_pb2.FieldDescriptorProto.Type.Name(field.type).removeprefix("TYPE_").lower()
    repeated = field.label == descriptor_pb2.FieldDescriptorProto.LABEL_REPEATED
    return f"{'repeated ' * repeated}{'optional ' * field.proto3_optional}`{name}`"


def _prose(comment: str) -> str:
    return "\n".join(line.removeprefix(" ") for line in comment.strip("\n").splitlines())


def _cell(comment: str) -> str:
    return " ".join(_prose(comment).split()).replace("|", "\\|")
