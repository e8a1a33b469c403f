# SPDX-License-Identifier: Apache-2.0
"""Parts of the Chameleon-style example: tokenisers, one token stream, the decoder, drawing."""
