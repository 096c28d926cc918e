"""Five thousand damaged files, all readers: no traceback, no hang, no look outside, no long message."""

from hostile.campaign import Watch, campaign


def test_damaged_files_are_read_or_refused_in_one_sentence() -> None:
    faults = campaign(5000, 0, Watch())
    assert {name: sentences for name, sentences in faults.items() if sentences} == {}
