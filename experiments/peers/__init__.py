# SPDX-License-Identifier: Apache-2.0
"""The other side of a comparison: scripts for libraries that the project does not depend on, each run by itself."""
