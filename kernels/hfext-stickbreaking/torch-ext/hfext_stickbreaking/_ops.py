"""The name under which this build registers its operations. The Hub's builder writes one of its own in its place."""


def add_op_namespace_prefix(name: str) -> str:
    return f"hfext_stickbreaking::{name}"
