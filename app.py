"""The search page, from a clone of the repository and as a Hugging Face Space: see `ieft/page/command.py`."""

from ieft.page.command import main

if __name__ == "__main__":
    main()
