"""Rows of CSV and TSV files, read line by line, so that a damaged line or a stray quotation mark costs one row."""

import contextlib
import csv
import math
from collections import Counter
from functools import lru_cache

from accent_plugin.data import labels, selection
from accent_plugin.errors import DataError

WRONG_CELLS = "wrong number of cells"
NOT_UTF8 = "invalid UTF-8"
NO_PATH = "no path"
SHIFTED = "shifted columns (votes, duration or age not a number)"


# A file with a larger fraction of damaged rows is refused.
_MAX_DAMAGED_FRACTION = 0.05
_MAX_LINES_OF_A_CELL = 100
_HEAD_BYTES = 1 << 20
_NAMES_LISTED = 20
_NAME_LENGTH = 40


class TableRows:
    """Rows of a table as lists of cells; damaged rows are counted.

    Cells are quoted as in CSV, and may then contain line feeds. A quotation mark that closes nowhere is text.

    Arguments
    ---------
    path : Path
        CSV or TSV in UTF-8. Lines end with LF, CR LF or CR.
    delimiter : str, optional
        None takes a tab, a semicolon or a comma, whichever the first line has.

    Raises
    ------
    DataError
        When the first line is not that of a table.
    """

    def __init__(self, path, delimiter=None):
        self.path = path
        with readable(path), open(path, "rb") as file:
            head = file.read(_HEAD_BYTES)
        if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise DataError(f"{path} is UTF-16; save it as UTF-8")
        self._bare_cr = b"\n" not in head and b"\r" in head
        try:
            first = head.partition(b"\r" if self._bare_cr else b"\n")[0].decode("utf-8-sig").rstrip("\r\n")
        except UnicodeDecodeError:
            raise DataError(f"{path} is not a table: its first line is not UTF-8") from None
        self._delimiter = delimiter or ("\t" if "\t" in first else ";" if ";" in first and "," not in first else ",")
        self.columns = self._cells(first)[0]
        self.damaged, self.line, self.cut = Counter(), 0, False
        self._shifted, self._example = 0, ""

    def __iter__(self):
        """Yield the cells of each row; ``line`` is the number of its last line, counted from 1."""
        self.damaged.clear()
        self._shifted = 0
        width, unclosed, whole = len(self.columns), [], True
        for number, (text, whole) in enumerate(self._lines(), 1):
            self.line = number
            if number == 1:
                continue
            if text is None:
                cells, closed = (), True
            elif '"' in text:
                cells, closed = self._cells(text)
            else:
                cells, closed = text.split(self._delimiter), True
            if unclosed:
                if text is not None and len(cells) != width and len(unclosed) < _MAX_LINES_OF_A_CELL:
                    unclosed.append(text)
                    cells, closed = self._cells("\n".join(unclosed))
                    if closed and len(cells) == width:
                        unclosed.clear()
                        yield cells
                    continue
                # This line is a row of its own, so the quotation mark before it is text.
                yield from self._with_literal_quotes(unclosed)
                unclosed.clear()
            if not closed:
                unclosed.append(text)
            elif len(cells) == width:
                yield cells
            elif text is None or text.strip():
                self.damaged[NOT_UTF8 if text is None else WRONG_CELLS] += 1
                self.cut = not whole
        count = self.damaged.total()
        yield from self._with_literal_quotes(unclosed)
        self.cut |= not whole and self.damaged.total() > count

    def is_shifted(self, found, cells, places):
        """Whether a row has the cells of other columns; such rows are counted.

        Arguments
        ---------
        found : dict
            The cells by role, votes and ``seconds`` as ``number_in`` returns them.
        cells : list of str
            The row.
        places : dict
            Role -> index of its column.
        """
        seconds, votes = found["seconds"], (found.get("up_votes"), found.get("down_votes"))
        role = "seconds" if seconds != seconds else _misplaced(*votes, found["age"], found["gender"])
        if role:
            self._shifted += 1
            if self._shifted == 1:
                self._example = f"line {self.line} has {role} '{cells[places[role]][:_NAME_LENGTH]}'"
        return bool(role)

    def report(self, damaged, warnings):
        """Add the damage and the shifted rows to those of a reader.

        Raises
        ------
        DataError
            When too many rows are damaged for the table to be usable.
        """
        damaged += self.damaged
        if self._shifted:
            damaged[SHIFTED] += self._shifted
            count = f"rows with shifted columns left out: {self._shifted}"
            warnings.append(f"{self.path.name}: {count}; the first: {self._example}")
        if self.cut:
            warnings.append(f"{self.path.name} ends in the middle of a line: it may be truncated")
        rows = self.line - 1
        if self.damaged.total() > max(1, _MAX_DAMAGED_FRACTION * rows):
            reasons = selection.in_words(self.damaged)
            raise DataError(f"{self.path} is damaged: of {rows} rows {reasons}; download or write it again")

    def _lines(self):
        """Yield the text of each line, or None where it is not UTF-8, and whether it ends in a line feed."""
        # Split at line feeds in binary: sentences contain other characters that Python takes for line ends.
        with readable(self.path), open(self.path, "rb") as file:
            lines = (line + b"\n" for line in file.read().split(b"\r")) if self._bare_cr else file
            for line in lines:
                try:
                    text = line.decode().rstrip("\r\n")
                except UnicodeDecodeError:
                    text = None
                yield text, line.endswith(b"\n")

    def _cells(self, text):
        """The cells of a line, and whether each quotation mark that opens a cell is closed by another."""
        try:
            return next(csv.reader([text], delimiter=self._delimiter, strict=True), []), True
        except csv.Error:
            return self._literal(text), False

    def _literal(self, text):
        return [_unquoted(cell) for cell in text.split(self._delimiter)]

    def _with_literal_quotes(self, lines):
        for text in lines:
            cells = self._literal(text)
            if len(cells) == len(self.columns):
                yield cells
            else:
                self.damaged[WRONG_CELLS] += 1


def _unquoted(cell):
    if len(cell) > 1 and cell[0] == cell[-1] == '"' and '"' not in cell[1:-1].replace('""', ""):
        return cell[1:-1].replace('""', '"')
    return cell


def require_usable(usable, where, damaged, warnings):
    """Refuse a source whose rows were all left out, and say why."""
    if not usable:
        reasons = "".join(f"\n{text}" for text in (selection.in_words(damaged), *warnings) if text)
        raise DataError(f"{where} has no usable row: download or write it again{reasons}")


def columns_in_words(columns):
    """The names of columns on one line, also where there are hundreds, or where the file is no table."""
    names = [name if len(name) <= _NAME_LENGTH else f"{name[:_NAME_LENGTH]}..." for name in columns[:_NAMES_LISTED]]
    more = len(columns) - len(names)
    return ", ".join(names) + (f" and {more} more" if more else "")


def require_once(path, columns, used):
    """Refuse a table that has one of the columns in use more than once."""
    if twice := sorted({name for name in used if columns.count(name) > 1}):
        listed = columns_in_words(columns)
        raise DataError(f"{path} has the column {twice[0]} more than once; its columns are {listed}")


def number_in(text):
    """A number of zero or more in a cell; None where the cell is missing, NaN where it holds something else."""
    if not labels.present(text):
        return None
    try:
        value = float(text)
    except ValueError:
        return math.nan
    return value if 0 <= value < math.inf else math.nan


# The combinations are few, and the rows millions.
@lru_cache(maxsize=10_000)
def _misplaced(up_votes, down_votes, age, gender):
    """The first of these cells that cannot hold what it holds, or None."""
    if up_votes != up_votes or down_votes != down_votes:
        return "up_votes" if up_votes != up_votes else "down_votes"
    if labels.gender(age) in ("male", "female"):
        return "age"
    return "gender" if gender in labels.DECADES else None


@contextlib.contextmanager
def readable(path):
    """Name the file that the system refuses to read."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise DataError(f"{error.filename or path} cannot be read: {error.strerror or error}") from None
