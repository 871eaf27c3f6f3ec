"""Tables of text and of Markdown."""

from collections.abc import Mapping, Sequence


def padded(lines: Sequence[Sequence[str]], texts: int, width: int = 0) -> list[list[str]]:
    """Lines whose columns are equally wide.

    Args:
        lines: The cells of each line. A line may lack its last cells.
        texts: Number of columns of text, which come first and are aligned on the left; the others on the right.
        width: Smallest width of a column.
    """
    columns = max(map(len, lines))
    widths = [max([width, *(len(line[i]) for line in lines if i < len(line))]) for i in range(columns)]
    return [
        [cell.ljust(widths[i]) if i < texts else cell.rjust(widths[i]) for i, cell in enumerate(line)]
        for line in lines
    ]


def format_table(lines: Sequence[Sequence[str]], markdown: bool = True, texts: int = 2) -> str:
    """A table whose first line is the header, in Markdown or as text in aligned columns.

    Args:
        lines: The cells of each line.
        markdown: Whether to write Markdown.
        texts: See `padded`.
    """
    header, *rows = padded(lines, texts)
    rule = ["-" * len(cell) for cell in header]
    if not markdown:
        return "\n".join("  ".join(line) for line in (header, rule, *rows))
    rule = [dashes if i < texts else f"{dashes[1:]}:" for i, dashes in enumerate(rule)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, rule, *rows))


def format_rows(rows: Sequence[Mapping[str, str | None]], markdown: bool = True) -> str:
    """A table of cells by column, in the order in which the columns occur; a missing or empty cell is a dash."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    return format_table([columns, *([row.get(column) or "-" for column in columns] for row in rows)], markdown)
