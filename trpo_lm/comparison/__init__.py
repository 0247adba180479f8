"""Many runs side by side: sweeps over arms and seeds, the best attainable score, figures, a page.

An annex: nothing else imports it. Imports everything above it, and TRL where an arm asks for it.
"""
