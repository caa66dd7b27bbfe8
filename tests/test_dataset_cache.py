import pytest

from dataset.cache import StringTable


def test_string_tables_return_what_was_put_in():
    strings = ["a", "", "naïve 中文 🙂", "odd \udc80 surrogate"]
    table = StringTable(strings)
    assert [table[i] for i in range(len(table))] == strings
    with pytest.raises(IndexError):
        table[len(strings)]
    assert len(StringTable([])) == 0
