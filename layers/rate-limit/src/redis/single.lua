-- A check of one key, once, whose charge is whole microseconds: most are, and
-- what all others need would take the server an eighth longer. What is odd
-- about its key is left to them.
if not KEYS[2] and not ARGV[3] then
  local u = tonumber(redis.pcall('GET', KEYS[1]) or now)
  if u and u - now < 1e14 and u % 1 == 0 then
    local iu, tu = ARGV[1] + 0, ARGV[2] + 0
    if u < now then u = now end
    local ahead = u - now
    if ahead <= tu then
      if ahead + iu <= tu then
        u = u + iu
        local format = string.format
        local ms = format('%d', (u - now + 999) / 1000 + 1)
        redis.call('PSETEX', KEYS[1], ms, format('%d%06d', u / 1000000, u % 1000000))
      end
      return ahead
    end
  end
end
