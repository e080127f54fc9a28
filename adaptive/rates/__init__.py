# SPDX-License-Identifier: Apache-2.0
"""How much to reduce at each layer, learned by gradient or found by search.

`proxy` (DiffRate's learned rates) with `masked` (its form in training), `schedules` (what comes out, and the spaces that are
searched), `search` (searchers that propose schedules and are told how good they were).
"""

from adaptive.rates import masked, proxy, schedules, search

__all__ = ["masked", "proxy", "schedules", "search"]
