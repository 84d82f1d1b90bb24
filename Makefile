venv:
	/usr/bin/python3 -m venv .venv
