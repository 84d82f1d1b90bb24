"""RFC 9113 and RFC 7541, rule by rule: peers made by hand speak to our worker over real TLS."""
