"""Many runs side by side: sweeps over arms and seeds, the best attainable score, figures, a page.

An annex: nothing else imports it. Imports all other folders, and TRL if an arm needs it.
"""
