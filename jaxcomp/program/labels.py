"""Labels of indices, and which of them turned out to be the same."""

import numpy as np


class Labels:
    """Disjoint sets of labels, a whole array at a time.

    A set whose indices cannot be removed is *frozen*, for a reason.
    """

    def __init__(self) -> None:
        self.size = 0
        self.reasons: list[str] = [""]
        self._parent = np.zeros(1024, np.int64)
        self._frozen = np.zeros(1024, np.int64)  # of a root: the number of the reason

    def fresh(self, count: int) -> np.ndarray:
        """Labels that nothing has yet."""
        found = np.arange(self.size, self.size + count)
        self.size += count
        if self.size > len(self._parent):
            more = np.zeros(self.size, np.int64)  # twice as many as there were
            self._parent = np.concatenate([self._parent, more])
            self._frozen = np.concatenate([self._frozen, more])
        self._parent[found] = found
        return found

    def roots(self, labels: np.ndarray) -> np.ndarray:
        """One label for each, the same for labels of one set."""
        found = self._parent[labels]
        while True:
            above = self._parent[found]
            if np.array_equal(above, found):
                self._parent[labels] = found
                return found
            found = above

    def join(self, left: np.ndarray, right: np.ndarray) -> None:
        """Makes the labels at equal positions one."""
        while True:
            a, b = self.roots(left), self.roots(right)
            apart = a != b
            if not apart.any():
                return
            low, high = np.minimum(a, b)[apart], np.maximum(a, b)[apart]
            self._parent[high] = low  # where `high` repeats, the next turn joins more
            np.maximum.at(self._frozen, low, self._frozen[high])

    def freeze(self, labels: np.ndarray, reason: str) -> None:
        """None of these can go; a set that is frozen already keeps its reason."""
        roots = self.roots(labels)
        live = roots[self._frozen[roots] == 0]
        if live.size:
            self._frozen[live] = len(self.reasons)
            self.reasons.append(reason)

    def is_frozen(self, labels: np.ndarray) -> np.ndarray:
        """bool, like ``labels``."""
        return self._frozen[self.roots(labels)] != 0

    def reason(self, label: int) -> str:
        """Why its set is frozen, or ""."""
        return self.reasons[self._frozen[self.roots(np.array([label]))[0]]]
