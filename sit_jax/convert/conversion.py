"""What is printed of a conversion: the network, both sides' hashes, a comparison."""

from sit_jax.convert import reference


def describe(stored, dtypes):
    """Prints the network and a row for each stack of layers."""
    model, side = stored.released.model, stored.config.shape
    print(
        f"{type(model).__name__}: depth {model.depth}, width {model.width}, heads "
        f"{model.heads}, patch {model.patch}, MLP ratio {model.mlp_ratio:g}, "
        f"{model.classes} classes, null label {model.null_label}, learn_sigma "
        f"{model.learn_sigma}, data {' x '.join(map(str, side))}, {', '.join(dtypes)}"
    )
    rows = [("torch", "tensors", "shape", "ours", "shape")]
    trained, params = stored.released.trained, stored.released.params
    for torch_name, path, _ in stored.released.rules:
        stacked, shape = "*" in torch_name, params[path].shape
        one = trained[torch_name.replace("*", "0")]
        rows.append((torch_name, shape[0] if stacked else 1, one, path, shape))
    for name, table in stored.released.constants.items():
        rows.append((name, 1, table.shape, "(constant, spare)", ""))
    columns(rows)


def summary(found, sides):
    rows = [("part", "tensors", "largest difference", "sha256 of the tensors")]
    for part, each in found.items():
        rows.append((part, each.tensors, f"{each.difference:g}", each.left))
        rows.append(("", "", "", each.right))
    columns(rows)
    print(f"upper of each two: {sides[0]}", f"lower: {sides[1]}", sep="\n")


def compare_networks(original, stored, state):
    if original is None:
        return
    model, shape = stored.released.model, stored.released.shape
    found = reference.differences(original, model, shape, state, stored.ema())
    print(f"relative L2 difference to the network of {original.__file__}:")
    columns([(stage, f"{value:.1e}") for stage, value in found])


def columns(rows):
    """Prints rows of cells, the cells of a column below each other."""
    rows = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())
