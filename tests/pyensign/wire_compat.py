"""Compares our descriptors with those that PyEnsign ships, field by field.

    wire_compat.py DESCRIPTORS      a serialized FileDescriptorSet (proto/build.rs writes public.bin)

Everything PyEnsign knows must be in ours, the same in name, number, type and label. Ours may add fields, numbered from
1001, and whole messages and enums, and nothing else.
"""

import importlib
import sys

from google.protobuf import descriptor_pb2 as pb

MODULES = {
    "api/v1beta1/ensign.proto": "pyensign.api.v1beta1.ensign_pb2",
    "api/v1beta1/event.proto": "pyensign.api.v1beta1.event_pb2",
    "api/v1beta1/groups.proto": "pyensign.api.v1beta1.groups_pb2",
    "api/v1beta1/query.proto": "pyensign.api.v1beta1.query_pb2",
    "api/v1beta1/topic.proto": "pyensign.api.v1beta1.topic_pb2",
    "mimetype/v1beta1/mimetype.proto": "pyensign.mimetype.v1beta1.mimetype_pb2",
    "region/v1beta1/region.proto": "pyensign.region.v1beta1.region_pb2",
}


def facts(file):
    """Everything of a file that shows on the wire or to reflection, one line each."""
    found = {f"package {file.package}", f"syntax {file.syntax}"}

    def enum(prefix, item):
        found.add(f"enum {prefix}{item.name} alias={item.options.allow_alias}")
        for value in item.value:
            found.add(f"value {prefix}{item.name}.{value.name} = {value.number}")

    def message(prefix, item):
        name = prefix + item.name
        found.add(f"message {name}")
        for field in item.field:
            oneof = item.oneof_decl[field.oneof_index].name if field.HasField("oneof_index") else ""
            found.add(
                f"field {name}.{field.name} = {field.number} type={field.type} {field.type_name} label={field.label}"
                f" oneof={oneof} json={field.json_name or camel(field.name)} optional={field.proto3_optional}"
            )
        for nested in item.nested_type:
            message(name + ".", nested)
        for nested in item.enum_type:
            enum(name + ".", nested)

    for item in file.message_type:
        message("", item)
    for item in file.enum_type:
        enum("", item)
    for service in file.service:
        for rpc in service.method:
            found.add(
                f"rpc /{file.package}.{service.name}/{rpc.name} {rpc.input_type} {rpc.output_type}"
                f" client_streaming={rpc.client_streaming} server_streaming={rpc.server_streaming}"
            )
    return found


def camel(name):
    head, *tail = name.split("_")
    return head + "".join(part[:1].upper() + part[1:] for part in tail)


def main():
    with open(sys.argv[1], "rb") as file:
        ours = {file.name: file for file in pb.FileDescriptorSet.FromString(file.read()).file}
    compared, wrong = 0, []
    for name, module in MODULES.items():
        shipped = pb.FileDescriptorProto.FromString(importlib.import_module(module).DESCRIPTOR.serialized_pb)
        theirs, mine = facts(shipped), facts(ours[name])
        compared += len(theirs)
        wrong += [f"{name}: missing or different: {fact}" for fact in sorted(theirs - mine)]
        known = {fact.split(" ")[1] for fact in theirs if fact.startswith(("message ", "enum "))}
        for fact in sorted(mine - theirs):
            kind, what = fact.split(" ")[:2]
            owner = what.rpartition(".")[0] if kind in ("field", "value") else what
            if kind in ("message", "field", "enum", "value") and owner not in known:
                continue  # a message or an enum that is all ours, for example the entry of a map
            number = int(fact.split(" = ")[1].split(" ")[0]) if fact.startswith("field ") else 0
            if number < 1001:
                wrong.append(f"{name}: not in the published API: {fact}")
    print("\n".join(wrong) or f"wire_compat: {compared} facts in {len(MODULES)} files are the same")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
