"""Where the pictures lie that visitors are annotating: the latest, within a budget.

Gradio would keep a page's state for an hour after its visitor has left, whatever it weighs.
"""

import secrets
import threading
from collections import OrderedDict

from visualize.demo.annotate import Page


class Shelf:
    """Pages by key. most_pixels, most_pages: of all pages together; where they are more, the oldest are put away."""

    def __init__(self, most_pixels: int = 100_000_000, most_pages: int = 100):
        self.most_pixels, self.most_pages = most_pixels, most_pages
        self._pages: OrderedDict[str, Page] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: str | None) -> Page | None:
        """The page of a visitor, None for one who has none yet, or whose page was put away."""
        with self._lock:
            if key not in self._pages:
                return None
            self._pages.move_to_end(key)
            return self._pages[key]

    def put(self, page: Page, key: str | None = None) -> str:
        """Keep a page, in the place of the visitor's last one; returns its key. The latest is kept, however large."""
        key = key or secrets.token_hex(16)
        with self._lock:
            self._pages[key] = page
            self._pages.move_to_end(key)
            while len(self._pages) > 1 and (len(self._pages) > self.most_pages or self._pixels() > self.most_pixels):
                self._pages.popitem(last=False)
        return key

    def _pixels(self) -> int:
        return sum(page.draft.picture.width * page.draft.picture.height for page in self._pages.values())
