"""The shell's door: `aligntune VERB`. Each verb imports what it needs when it runs, so that help answers at once."""
