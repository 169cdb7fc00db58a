"""Why a changed file may be read and give another result: a class for each reason, with its argument."""

from mutations import Mutation


def explained(reader: str, holds: str, whole: bytes, mutation: Mutation) -> tuple[str, bool]:
    return "", False
