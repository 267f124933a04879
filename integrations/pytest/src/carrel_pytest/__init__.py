"""Every test in a microVM of its own: see carrel_pytest.plugin."""
