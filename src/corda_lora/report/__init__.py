"""What the commands show: text, tables, pictures, pages."""
