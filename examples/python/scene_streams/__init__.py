# SPDX-License-Identifier: Apache-2.0
"""From scenes to what models read: words, image codes or latents, speech codes, and streams of them."""
