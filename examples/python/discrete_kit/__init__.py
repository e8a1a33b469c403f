# SPDX-License-Identifier: Apache-2.0
"""Settings in which every modality is discrete tokens: text and images as in Chameleon, and speech with them."""
