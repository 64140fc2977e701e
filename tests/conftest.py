"The order of the tests: slow ones first, so that none of them is left over when all else is done."


def pytest_collection_modifyitems(items: list) -> None:
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
